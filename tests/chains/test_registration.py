"""Networks from outside this library: what `register` refuses leaves nothing behind."""

from dataclasses import replace

import pytest

from chains.arch import Architecture, Group
from chains.architectures import architecture, architecture_names, is_architecture, register
from chains.backbones import BACKBONES, backbone
from chains.backbones import register as register_both
from chains.backbones.resnet import ResNet
from chains.errors import ArchitectureError
from chains.width import Width


def renamed(name: str) -> Architecture:
    return replace(architecture("resnet18"), name=name)


def with_idle_group(name: str) -> Architecture:
    table = renamed(name)
    return replace(table, groups={**table.groups, "idle": Group("idle")})


@pytest.mark.parametrize("name", ["resnet18", "resnet18_emb64", "vit_small@384x128"])
def test_a_name_that_is_known_or_written_by_a_grammar_is_taken(name: str) -> None:
    with pytest.raises(ArchitectureError, match=f"an architecture '{name}' already"):
        register(name, renamed)


def test_a_table_of_another_name_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="registered as 'mine' calls itself 'resnet18'"):
        register("mine", lambda _: architecture("resnet18"))


def test_a_table_that_contradicts_itself_is_refused() -> None:
    known = architecture_names()
    with pytest.raises(ArchitectureError, match=r"mine: no layer's rows are channels of \['idle'\]"):
        register_both("mine", with_idle_group, ResNet)
    assert architecture_names() == known
    assert "mine" not in BACKBONES
    assert not is_architecture("mine")
    with pytest.raises(ArchitectureError, match="'mine' has no torch module"):
        backbone("mine", Width(4))
