"""From networks that see half a person each to a device: fused into one teacher, refined, promoted and handed out.

    python examples/partial_teachers_to_device.py --url http://127.0.0.1:8000 --key ww_...

As `teacher_to_device.py`, whose way it goes from the teacher on. Two small networks are trained here on synthetic
people (needs the `train` extra), one on their upper halves and one on their legs. The second is sent as a plain ONNX
file, as one gets it from others: no chain could be made of it. The service fuses both into a teacher of the whole
person.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teacher_to_device import (
    HEIGHT,
    PEOPLE,
    RIGHTS,
    WIDTH,
    Api,
    Failed,
    finished,
    pack_people,
    print_checked,
    refine,
    run_models,
    send_people,
    send_teacher,
)

from chains.data.synthetic import train_images

VIEWS = {"upper": (0.0, 0.5), "legs": (0.5, 1.0)}  # rows from and to, as fractions of the height
FOREIGN = "legs"
SIDE = 32  # pixels either way, of what both see


def train_parts(folder: Path, steps: int) -> dict[str, Path]:
    """A file for every view. Torch is needed here and nowhere else."""
    from chains.data.batches import BatchRecipe
    from chains.export import origin, save_trained
    from chains.fuse.viewed import train_partial
    from chains.fuse.views import View
    from chains.train import Run, TrainRecipe, every
    from chains.width import Width

    files = {}
    for seed, (name, (top, bottom)) in enumerate(VIEWS.items(), 1):
        recipe = TrainRecipe(steps, lr=2e-3, precision="bfloat16", batch=BatchRecipe(16, 4))
        view, run = View(top, bottom, SIDE, SIDE), Run(report=every(100, print))
        trained, spec = train_partial("resnet18", Width(16), train_images(PEOPLE), view, recipe, seed, run)
        if name == FOREIGN:
            files[name] = folder / f"{name}.onnx"
            export_onnx(trained.model, files[name])
        else:
            files[name] = folder / f"{name}.safetensors"
            save_trained(trained, origin("teacher", trained.model, spec, RIGHTS["license"]), files[name])
    return files


def export_onnx(model: Any, path: Path) -> None:
    """Embedding and feature map, as anybody may export their own network."""
    import torch

    from chains.fuse.partials import perceive

    class Shown(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            answer = perceive(self.model, images)
            return answer.embedding, answer.map

    free = {name: {0: "batch"} for name in ("images", "embedding", "map")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has a newer exporter, which needs one more package
        torch.onnx.export(
            Shown().eval(), (torch.zeros(2, 3, SIDE, SIDE),), str(path), dynamo=False, opset_version=17,
            input_names=["images"], output_names=["embedding", "map"], dynamic_axes=free,
        )  # fmt: skip


def fuse(api: Api, name: str, steps: int, *, keep_worse: bool) -> dict[str, Any]:
    """Ask for the fusion, watch it, and return the new teacher."""
    request = {
        "name": name,
        "dataset": name,
        "inputs": [
            {"teacher": part_name(name, part), "view": {"top": top, "bottom": bottom}}
            for part, (top, bottom) in VIEWS.items()
        ],
        "image": {"height": HEIGHT, "width": WIDTH},
        "architecture": "resnet18",
        "width": "16",
        "steps": steps,
        "precision": "bfloat16",
        "keep_worse": keep_worse,
    }
    result = finished(api, "fuse", request)
    for one in result["inputs"]:
        print(f"mAP of {one['teacher']} alone: {one['map']:.1f}")
    print(f"mAP of both inputs joined: {result['ensemble']['map']:.1f}")
    print(f"mAP of the fused teacher: {result['accuracy']['map']:.1f}")
    return dict(api.json("GET", f"/teachers/{name}"))


def part_name(name: str, part: str) -> str:
    return f"{name}-{part}"


def follow_back(api: Api, chain: str, sent: Mapping[str, str]) -> None:
    """From the chain to the files that were sent. Raises `Failed` where the trail ends."""
    made_from = api.json("GET", f"/chains/{chain}")["provenance"]["made_from"]
    teacher = api.json("GET", f"/teachers/{made_from['teacher']}")
    found = {one["teacher"]: one["sha256"] for one in teacher["report"]["made_from"]["inputs"]}
    if made_from["teacher_sha256"] != teacher["sha256"] or found != dict(sent):
        raise Failed(f"chain {chain} says it was made from {json.dumps(found)}, and {json.dumps(sent)} was sent")
    print(f"chain {chain} was made from teacher {teacher['name']}, {teacher['sha256'][:12]}…, and that from:")
    for name, sha256 in found.items():
        print(f"  {name} {sha256[:12]}…")


def main() -> None:
    options = parse()
    api = Api(options.url, options.key)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        send_people(api, options.name, pack_people(folder))
        parts = {part_name(options.name, part): file for part, file in train_parts(folder, options.part_steps).items()}
        sent = {name: send_teacher(api, name, file) for name, file in parts.items()}
    for path in (f"/datasets/{options.name}", *(f"/teachers/{name}" for name in sent)):
        print_checked(api, path)
    fused = fuse(api, options.name, options.fuse_steps, keep_worse=options.keep_worse)
    print(f"teacher {fused['name']}: {fused['architecture']} of width {fused['width']}")
    refine(api, options.name, options.steps, options.processes)
    follow_back(api, options.name, sent)
    api.json("PUT", f"/chains/{options.name}/aliases/stable", {})
    maps = run_models(api, options.name)
    print("mAP of the three devices in the widest one's gallery: " + ", ".join(f"{value:.1f}" for value in maps))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default=os.environ.get("WIDTHWISE_KEY"), help="admin key; default WIDTHWISE_KEY")
    parser.add_argument("--name", default="fused", help="of data set, fused teacher and chain")
    parser.add_argument("--part-steps", type=int, default=200, help="of each network that sees a part")
    parser.add_argument("--fuse-steps", type=int, default=400, help="of the fusion")
    parser.add_argument("--steps", type=int, default=200, help="of the refinement")
    parser.add_argument("--processes", type=int, default=1, help="torchrun processes of the refinement")
    parser.add_argument("--keep-worse", action="store_true", help="go on with a teacher worse than its best input")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except Failed as failure:
        sys.exit(f"partial_teachers_to_device: {failure}")
