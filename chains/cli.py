"""The research commands: `widthwise refine | calibrate | evaluate | finetune | compress | fuse | compare | export |
import-chain | inspect | validate`.

Options are declared here and nothing else: the work is in `chains.commands`, which is imported when a command runs. So
`widthwise serve`, and `--help`, load no torch. A mistake of the user ends with one line and status 2.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from chains.errors import ChainsError
from chains.tables import printable

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

SOURCE = (
    "images: a folder or CSV file, KIND:PATH where its layout is not to be found out (market1501, cuhk03-np, msmt17, "
    "viper, csv, folder), synthetic, synthetic:station, or a run's TOML file"
)
ChainFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a chain file")]
Data = Annotated[str, typer.Option(help=SOURCE)]
Seed = Annotated[int, typer.Option(min=0, help="of random choices")]
Rerank = Annotated[bool, typer.Option("--rerank", help="rank by k-reciprocal re-ranking (Zhong et al., CVPR 2017)")]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the checkpoints in the directory")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]


class ResearchCommand(TyperCommand):
    """A command whose expected failures are one line on standard error and status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ChainsError, OSError) as error:  # OSError: a disk that is full, a folder that may not be written
            typer.echo(f"widthwise: {printable(str(error))}", err=True)
            raise typer.Exit(2) from error


@cli.command(cls=ResearchCommand)
def refine(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a run's TOML file")],
    out: Annotated[Path | None, typer.Option(help="run directory; default runs/NAME")] = None,
    resume: Resume = False,
    seed: Annotated[int | None, typer.Option(min=0, help="instead of the file's seed")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="of the refinement, instead of the file's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, instead of the file's")] = None,
    compatible_with: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="an old chain, whose galleries shall stay searchable"),
    ] = None,
) -> None:
    """Train a teacher, refine it into a chain, calibrate and measure every width. Also under torchrun."""
    text = _commands().refine(
        config,
        out,
        resume=resume,
        seed=seed,
        steps=steps,
        device=device,
        compatible_with=compatible_with,
        say=_say,
    )
    _print(text)


@cli.command(cls=ResearchCommand)
def calibrate(
    chain: ChainFile,
    data: Data,
    out: Annotated[Path, typer.Option(help="the new chain file")],
    images: Annotated[int, typer.Option(min=256, help="how many training images to use")] = 1024,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure the normalisation statistics of every width anew, on training images of yours; no labels are used."""
    _print(_commands().calibrated(chain, data, out, images=images, seed=seed, device=device))


@cli.command(cls=ResearchCommand)
def evaluate(
    chain: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a chain file, or an ONNX file of one")],
    data: Data,
    width: Annotated[list[str] | None, typer.Option(help="only this width; may be given again")] = None,
    rerank: Rerank = False,
    json: AsJson = False,
    plots: Annotated[Path | None, typer.Option(help="folder for frontier.png and cross_width.png")] = None,
    write: Annotated[Path | None, typer.Option(help="new chain file with this frontier in it")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure a chain: frontier, cross-width matrix and same-person cut-offs; of an ONNX file, its accuracy."""
    text = _commands().evaluate(
        chain, data, width or (), rerank=rerank, as_json=json, plots_to=plots, write=write, seed=seed, device=device
    )
    _print(text)


@cli.command(cls=ResearchCommand)
def finetune(
    chain: ChainFile,
    width: Annotated[str, typer.Option(help="of the student, such as 16x2-4-8, or 16")],
    data: Data,
    out: Annotated[Path, typer.Option(help="run directory")],
    recipe: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML file; default: the OSKT paper's schedule")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the recipe's")] = None,
    lr: Annotated[float | None, typer.Option(help="learning rate instead of the recipe's")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = False,
) -> None:
    """Train one student on images of yours, from its expansion. It leaves the chain's embedding space."""
    text = _commands().finetune(
        chain,
        width,
        data,
        out,
        recipe=recipe,
        steps=steps,
        lr=lr,
        seed=seed,
        device=device,
        resume=resume,
        say=_say,
    )
    _print(text)


@cli.command(cls=ResearchCommand)
def fuse(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a fusion's TOML file")],
    out: Annotated[Path | None, typer.Option(help="run directory; default runs/NAME")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(exists=True, help="one network of the whole image, in the place of the file's inputs"),
    ] = None,
    resume: Resume = False,
    keep_worse: Annotated[
        bool, typer.Option("--keep-worse", help="write the teacher though one of its inputs is better")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="instead of the file's seed")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the file's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, instead of the file's")] = None,
) -> None:
    """Make one teacher, of which a chain can be made, from networks that see a part of the person each, or from one
    foreign network; ONNX files of anywhere, too. Status 2 if it is worse than the best of them. Also under torchrun."""
    text, wrong = _commands().fuse(
        config,
        out,
        teacher=teacher,
        resume=resume,
        keep_worse=keep_worse,
        seed=seed,
        steps=steps,
        device=device,
        say=_say,
    )
    _print(text)
    if wrong is not None:
        typer.echo(f"widthwise: {wrong}", err=True)
        raise typer.Exit(2)


Limit = Annotated[int | None, typer.Option(min=1, help="of the model, for one image")]


@cli.command(cls=ResearchCommand)
def compress(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a teacher's file, or a chain")],
    data: Data,
    out: Annotated[Path, typer.Option(help="run directory")],
    width: Annotated[str | None, typer.Option(help="of a chain's student; default: its widest")] = None,
    max_macs: Limit = None,
    max_flops: Limit = None,
    max_params: Limit = None,
    max_artifact_bytes: Limit = None,
    max_peak_activation_bytes: Limit = None,
    max_memory_bytes: Limit = None,
    recipe: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML file; default: the DEAP paper's schedule")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="of the training with pruners, instead of the recipe's")
    ] = None,
    finetune_steps: Annotated[
        int | None, typer.Option(min=1, help="of the pruned network, instead of the recipe's")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="weights to begin with instead of the teacher's, as ImageNet's"),
    ] = None,
    compatible_with: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="a chain whose embedding space shall be met")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the new chain; default: the source's and '-deap'")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    resume: Resume = False,
) -> None:
    """Prune one network for one target while it is distilled (DEAP): one training run, one model. Also under
    torchrun."""
    given = {
        "max_macs": max_macs,
        "max_flops": max_flops,
        "max_params": max_params,
        "max_artifact_bytes": max_artifact_bytes,
        "max_peak_activation_bytes": max_peak_activation_bytes,
        "max_memory_bytes": max_memory_bytes,
    }
    text = _commands().compress(
        source,
        data,
        out,
        limits={limit: allowed for limit, allowed in given.items() if allowed is not None},
        resume=resume,
        say=_say,
        width=width,
        recipe=recipe,
        steps=steps,
        finetune_steps=finetune_steps,
        start=start,
        compatible_with=compatible_with,
        name=name,
        seed=seed,
        device=device,
    )
    _print(text)


@cli.command(cls=ResearchCommand)
def compare(
    chains: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="chain files")],
    data: Data,
    out: Annotated[Path | None, typer.Option(help="folder for compare.csv and frontier.png")] = None,
    rerank: Rerank = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Measure chains on the same images: frontiers side by side, and where their embeddings are equally long each
    chain's queries in the others' galleries."""
    _print(_commands().compare(chains, data, out, rerank=rerank, seed=seed, device=device))


@cli.command(cls=ResearchCommand)
def export(
    chain: ChainFile,
    width: Annotated[str, typer.Option(help="of the student, such as 16x2-4-8, or 16")],
    out: Annotated[Path, typer.Option(help="the new file")],
    format: Annotated[str, typer.Option(help="onnx, or safetensors to train on")] = "onnx",
    opset: Annotated[int | None, typer.Option(help="onnx: operator set; default 17")] = None,
    embedding: Annotated[str | None, typer.Option(help="onnx: common or native; default common")] = None,
    preprocess: Annotated[str | None, typer.Option(help="onnx: none or in-graph; default none")] = None,
) -> None:
    """Write the student of one width as an ONNX or safetensors file."""
    given = {"opset": opset, "embedding": embedding, "preprocess": preprocess}
    options = {name: value for name, value in given.items() if value is not None}
    _print(_commands().export(chain, width, format, out, options))


@cli.command("import-chain", cls=ResearchCommand)
def import_chain(
    state: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="the OSKT authors' state dict")],
    matcher: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="the gene_matcher.json beside it")],
    ladder: Annotated[str, typer.Option(help="widths, narrow to wide, such as 8,16x2-3-4,64 or w120,w168,w384")],
    out: Annotated[Path, typer.Option(help="the new chain file")],
    input: Annotated[str, typer.Option(help="height × width of images in pixels")] = "256x128",
    name: Annotated[str | None, typer.Option(help="of the chain; default that of the file")] = None,
    license: Annotated[str, typer.Option(help="of the weights")] = "unknown",
    projection_bias: Annotated[
        str, typer.Option(help="ViT: attention projections take the bias of chain, as in the paper, or of teacher")
    ] = "chain",
) -> None:
    """Read a weight chain that the authors of OSKT refined into a chain file. Calibrate it before it is used."""
    text = _commands().import_chain(
        state, matcher, ladder, out, size=input, name=name, license=license, projection_bias=projection_bias
    )
    _print(text)


@cli.command(cls=ResearchCommand)
def inspect(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="a chain, weights of any kind, ONNX, a gene matcher")
    ],
    json: AsJson = False,
) -> None:
    """Say what a file is: architecture, widths and what they cost, which channels are cut together, where it came
    from. Nothing of the file is run."""
    _print(_commands().inspect(file, as_json=json))


@cli.command(cls=ResearchCommand)
def validate(
    data: Data,
    decode: Annotated[bool, typer.Option(help="decode every image, or read headers only")] = True,
    json: AsJson = False,
) -> None:
    """Look at a data set: counts, broken files, and what would make figures wrong. Status 2 if it is not usable."""
    text, is_usable = _commands().validate(data, decode=decode, as_json=json, say=_say)
    _print(text)
    if not is_usable:
        raise typer.Exit(2)


def _commands() -> ModuleType:
    """The commands' module. Ends with the name of the extra where what they need is not installed."""
    try:
        from chains import commands
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in {"app", "chains"}:
            raise
        typer.echo(
            f"widthwise: this command needs {error.name}; install the training extra: pip install 'widthwise[train]' "
            "(the README says how to get torch without CUDA)",
            err=True,
        )
        raise typer.Exit(2) from error
    return commands


def _say(line: str) -> None:
    """Progress, on standard error: standard output is for the result."""
    typer.echo(line, err=True)


def _print(text: str) -> None:
    if text:
        typer.echo(text)
