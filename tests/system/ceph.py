"""A throw-away S3 server that is not a mock: one Ceph monitor, one OSD in memory, one RADOS gateway, on loopback."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.app.conftest import answers, running
from tests.system.ports import lasting_port

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph")
ACCESS_KEY, SECRET_KEY = "widthwise", "a-secret-of-the-tests"
CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon}
auth cluster required = none
auth service required = none
auth client required = none
keyring = {home}/keyring
run dir = {home}
admin socket = {home}/$name.asok
log file = {home}/$name.log
mon data = {home}/mon
osd data = {home}/osd
rgw data = {home}/rgw
osd objectstore = memstore
memstore device bytes = 4294967296
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon max pg per osd = 1000
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
osd max object name len = 256
osd max object namespace len = 64
ms bind ipv6 = false
ms mon cluster mode = crc
ms mon service mode = crc
ms mon client mode = crc
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
public addr = 127.0.0.1
cluster addr = 127.0.0.1
"""


def missing_programs() -> list[str]:
    """What a machine lacks; Debian's packages are ceph-mon, ceph-osd, ceph-common and radosgw."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def rados_gateway(home: Path) -> Iterator[str]:
    """Its URL, from when it answers until the end of the block. Everything it writes is under `home`."""
    fsid, mon, port = str(uuid.uuid4()), lasting_port(), lasting_port()
    conf = home / "ceph.conf"
    conf.write_text(CONFIGURATION.format(fsid=fsid, mon=mon, home=home))
    (home / "keyring").write_text("")  # nobody has a key, and the gateway wants to read where it would be
    common = ["-c", str(conf)]
    for folder in ("mon", "osd", "rgw"):
        (home / folder).mkdir()

    def call(*command: str) -> None:
        subprocess.run([*command, *common], check=True, capture_output=True, timeout=120, cwd=home)

    with ExitStack() as stack:
        call("ceph-mon", "--mkfs", "-i", "a", "--fsid", fsid, "--public-addrv", f"[v2:127.0.0.1:{mon}]")
        stack.enter_context(running(["ceph-mon", "-f", "-i", "a", *common], lambda: _answers(home, common), cwd=home))
        osd = str(uuid.uuid4())
        call("ceph", "osd", "new", osd)
        call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd)
        stack.enter_context(running(["ceph-osd", "-f", "-i", "0", *common], lambda: _has_osd(home, common), cwd=home))
        gateway = ["radosgw", "-f", "-n", "client.admin", f"--rgw-frontends=beast endpoint=127.0.0.1:{port}", *common]
        stack.enter_context(running(gateway, lambda: answers(f"http://127.0.0.1:{port}/"), cwd=home))
        user = ["--uid=widthwise", "--display-name=Widthwise", f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}"]
        call("radosgw-admin", "user", "create", *user)
        yield f"http://127.0.0.1:{port}"


def _answers(home: Path, common: list[str]) -> bool:
    return _ceph(home, common, "mon", "stat").returncode == 0


def _has_osd(home: Path, common: list[str]) -> bool:
    return "1 up" in _ceph(home, common, "osd", "stat").stdout


def _ceph(home: Path, common: list[str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ceph", "--connect-timeout", "15", *command, *common], capture_output=True, text=True, cwd=home, check=False
    )
