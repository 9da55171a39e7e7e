"""What each research command does, once its options are read: values in, the text to print out.

`chains.cli` imports this module when a command runs, so that listing the commands, or serving, loads no torch.
"""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from chains import pipeline, plots, tables
from chains.artifact import StoredChain, save
from chains.atomic import write_whole
from chains.budget import COST_OF_LIMIT, Limits
from chains.calibrate import calibrate
from chains.chain import Chain, Floats
from chains.compatible import compatibility_of
from chains.compress.folder import Asked, compress_run
from chains.config import RecipeFile, from_toml, mistake_in, overridden, read_config
from chains.data.images import Images
from chains.data.validation import validate as validate_dataset
from chains.describe import describe, text_of
from chains.downstream import Downstream, finetune_run
from chains.errors import ChainMismatch, ChainsError, DataError
from chains.evaluate import embed, measure_frontier
from chains.export import export_safetensors
from chains.fuse.config import only_input, read_fusion
from chains.fuse.run import report_text, run_fusion, verdict
from chains.importers.oskt_chains import Wanted, import_files
from chains.model import load_student
from chains.onnxfile import EmitOptions
from chains.onnxfile import write as write_onnx
from chains.onnxrun import OnnxModel
from chains.pipeline import load_chain
from chains.processes import local_device
from chains.ranking import Ranking, Truth, rank_blocks, rank_sets, score_blocks
from chains.rerank import Reranking, reranked_blocks
from chains.sources import Source, choose, open_source, parse_source, read_dataset, sized
from chains.train import TrainRecipe, paper_recipe
from chains.width import Width

Say = Callable[[str], None]


def refine(
    path: Path,
    out: Path | None,
    *,
    resume: bool,
    seed: int | None,
    steps: int | None,
    device: str | None,
    compatible_with: Path | None,
    say: Say,
) -> str:
    """`widthwise refine`."""
    config = read_config(path)
    known = {} if config.compatible_with is None else dict(config.compatible_with)
    old = None if compatible_with is None else {**known, "chain": compatible_with}
    config = overridden(config, {"seed": seed, "device": device, "compatible_with": old})
    folder = out or Path("runs") / config.name
    stored = pipeline.run_refinement(config, folder, resume=resume, steps=steps, say=say)
    if stored is None:
        return ""
    compatibility = compatibility_of(stored.chain)
    across_time = "" if compatibility is None else f"\n{tables.compatibility_text(compatibility)}\n"
    return f"{described(stored)}\n{across_time}{folder / pipeline.CHAIN}: sha256 {stored.digest}"


def calibrated(chain: Path, data: str, out: Path, *, images: int, seed: int, device: str) -> str:
    """`widthwise calibrate`."""
    require_free(out)
    stored = load_chain(chain)
    source = images_for(stored.chain, data)
    new = save(calibrate(stored.chain, choose(source.train, images, seed), device), out)
    return f"{out}: {len(new.chain.ladder)} widths calibrated, sha256 {new.digest}"


def evaluate(
    chain: Path,
    data: str,
    widths: Sequence[str],
    *,
    rerank: bool,
    as_json: bool,
    plots_to: Path | None,
    write: Path | None,
    seed: int,
    device: str,
) -> str:
    """`widthwise evaluate`."""
    if chain.suffix == ".onnx":
        for_chains = {"width": widths, "plots": plots_to, "write": write, "device": device != "cpu"}
        for option in (name for name, value in for_chains.items() if value):
            raise DataError(f"--{option} is for chains; an ONNX file is measured as the one model it is, on the CPU")
        return evaluate_onnx(chain, data, rerank=rerank, as_json=as_json, seed=seed)
    if write is not None:
        require_free(write)
        if widths:
            raise DataError("a stored frontier covers the whole ladder; give --write or --width, not both")
    stored = load_chain(chain)
    measured = with_frontier(stored, images_for(stored.chain, data), widths, rerank=rerank, seed=seed, device=device)
    report = pipeline.report_of(measured)
    lines = [json.dumps(report, indent=2) if as_json else tables.report_text(report)]
    if plots_to is not None:
        write_plots(plots_to, measured.chain)
    if write is not None:
        written = save(measured.chain, write)
        lines += [] if as_json else [f"\n{write}: sha256 {written.digest}"]
    return "\n".join(lines)


def evaluate_onnx(path: Path, data: str, *, rerank: bool, as_json: bool, seed: int) -> str:
    """Accuracy of one ONNX file of this program, in onnxruntime."""
    model = OnnxModel(path)
    source = open_source(sized(parse_source(data), model.height, model.width))
    rounded = figures(rank_embedded(model.embed, source, rerank=rerank), seed)
    if as_json:
        return json.dumps({"model": path.name, "dataset": source.name, **rounded}, indent=2)
    return f"{path.name} on {source.name}\n\n" + tables.text_table([list(rounded), [str(v) for v in rounded.values()]])


def finetune(
    chain: Path,
    width: str,
    data: str,
    out: Path,
    *,
    recipe: Path | None,
    steps: int | None,
    lr: float | None,
    seed: int,
    device: str,
    resume: bool,
    say: Say,
) -> str:
    """`widthwise finetune`."""
    stored = load_chain(chain)
    source = images_for(stored.chain, data)
    chosen = paper_recipe(source.train, "finetune") if recipe is None else read_recipe(recipe)
    chosen = replace(chosen, steps=chosen.steps if steps is None else steps, lr=chosen.lr if lr is None else lr)
    task = Downstream(stored, width_of(stored.chain, width), source, chosen, seed, device)
    outcome = finetune_run(task, out, resume=resume, say=say)
    if outcome is None:
        return ""
    before, after = outcome
    figures = [[name, f"{r.map:.1f}", f"{r.rank(1):.1f}"] for name, r in (("before", before), ("after", after))]
    return tables.text_table([["finetuning", "mAP %", "Rank-1"], *figures]) + f"\n{out}"


def fuse(
    path: Path,
    out: Path | None,
    *,
    teacher: Path | None,
    resume: bool,
    keep_worse: bool,
    seed: int | None,
    steps: int | None,
    device: str | None,
    say: Say,
) -> tuple[str, str | None]:
    """`widthwise fuse`: the report, and what is wrong with a teacher that was not kept."""
    given = {"inputs": None if teacher is None else only_input(teacher), "seed": seed, "device": device}
    config = read_fusion(path, {name: value for name, value in given.items() if value is not None})
    folder = out or Path("runs") / config.name
    report = run_fusion(config, folder, resume=resume, keep_worse=keep_worse, say=say, steps=steps)
    if report is None:
        return "", None
    told = verdict(report)
    if not report["is_kept"]:
        return report_text(report), told
    digest = f"{folder / pipeline.TEACHER}: sha256 {report['teacher']['sha256']}"
    return "\n\n".join(filter(None, [report_text(report), told, digest])), None


def compress(
    source: Path, data: str, out: Path, *, limits: Mapping[str, int], resume: bool, say: Say, **options: Any
) -> str:
    """`widthwise compress`. options: the other fields of `chains.compress.folder.Asked`."""
    asked = Asked(source, parse_source(data), Limits(**limits) if limits else None, **options)
    report = compress_run(asked, out, resume=resume, say=say)
    if report is None:
        return ""
    (after,) = report["widths"]
    rows = [["compression", "mAP %", "Rank-1"]]
    rows += [[name, f"{report[name]['map']:.1f}", f"{report[name]['rank1']:.1f}"] for name in ("teacher", "before")]
    rows += [["after", f"{after['map']:.1f}", f"{after['rank1']:.1f}"]]
    costs = [["cost", "of the model", "limit"]]
    costs += [[name, f"{value:,}", _limit_on(name, report["limits"])] for name, value in report["costs"].items()]
    space = report.get("compatible_with")
    across_time = "" if space is None else f"\n\n{tables.compatibility_text(space)}"
    file = out / pipeline.CHAIN
    tables_text = "\n\n".join(tables.text_table(table) for table in (rows, costs))
    return f"{tables_text}{across_time}\n\n{file}: sha256 {report['digest']}"


def _limit_on(cost: str, limits: Mapping[str, int]) -> str:
    """The limit that was stated on `cost`, if any."""
    stated = [allowed for limit, allowed in limits.items() if COST_OF_LIMIT[limit] == cost]
    return f"{stated[0]:,}" if stated else ""


def compare(chains: Sequence[Path], data: str, out: Path | None, *, rerank: bool, seed: int, device: str) -> str:
    """`widthwise compare`."""
    stored = [load_chain(path) for path in chains]
    names = [one.chain.name for one in stored]
    if len(set(names)) < len(names):  # the same chain, retrained: told apart by their files
        names = [str(path) for path in chains]
    measured = [
        with_frontier(one, images_for(one.chain, data), (), rerank=rerank, seed=seed, device=device) for one in stored
    ]
    reports = [{**pipeline.report_of(one), "chain": name} for one, name in zip(measured, names, strict=True)]
    lines = [f"on {reports[0]['dataset']}", tables.comparison(reports), *across(stored, names, data, device)]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        curves = [
            replace(plots.curve_of(one.chain, one.chain.frontier), name=name)
            for one, name in zip(measured, names, strict=True)
            if one.chain.frontier is not None
        ]
        write_whole(out / "frontier.png", plots.frontier_png(curves, reports[0]["dataset"]))
        write_whole(out / "compare.csv", comparison_csv(reports).encode())
    return "\n\n".join(lines)


def export(chain: Path, width: str, format: str, out: Path, options: Mapping[str, Any]) -> str:
    """`widthwise export`."""
    require_free(out)
    stored = load_chain(chain)
    rung = width_of(stored.chain, width)
    if format == "onnx":
        write_whole(out, write_onnx(stored, rung, EmitOptions(**options)))
    elif format == "safetensors":
        if options:
            raise DataError(f"--{min(options)} is for --format onnx; a safetensors file holds the bare network")
        export_safetensors(stored, rung, out)
    else:
        raise DataError(f"no format is called '{format}'; there are onnx and safetensors")
    return f"{out}: {out.stat().st_size:,} bytes, {stored.chain.name} at {rung}"


def import_chain(
    state: Path,
    matcher: Path,
    ladder: str,
    out: Path,
    *,
    size: str,
    name: str | None,
    license: str,
    projection_bias: str,
) -> str:
    """`widthwise import-chain`."""
    require_free(out)
    height, width = size_of(size)
    rungs = tuple(rung.strip() for rung in ladder.split(","))
    if projection_bias not in ("chain", "teacher"):
        raise DataError(f"--projection-bias is '{projection_bias}'; there are chain and teacher")
    wanted = Wanted(name or out.stem, rungs, height, width, license, projection_bias)  # type: ignore[arg-type] # checked
    imported = import_files(state, matcher, wanted)
    stored = save(imported.chain, out)
    return f"{imported.text()}\n\n{out}: sha256 {stored.digest}"


def inspect(file: Path, *, as_json: bool) -> str:
    """`widthwise inspect`."""
    found = describe(file)
    return json.dumps(found, indent=2, allow_nan=False) if as_json else text_of(found)


def validate(data: str, *, decode: bool, as_json: bool, say: Say) -> tuple[str, bool]:
    """`widthwise validate`: the report, and whether the data set is usable."""

    def progress(done: int, files: int) -> None:
        if done % 5000 == 0:
            say(f"{done:,} of {files:,} files")

    report = validate_dataset(read_dataset(parse_source(data)), decode, progress=progress)
    return report.json() if as_json else report.table(), report.is_usable


# --- parts


def rank_embedded(embed: Callable[[Images], Floats], source: Source, *, rerank: bool) -> Ranking:
    """How a model that embeds images so ranks the gallery of `source`."""
    queries, gallery = embed(source.query), embed(source.gallery)
    truth = Truth.of(source.query, source.gallery)
    blocks = reranked_blocks(queries, gallery, truth, Reranking()) if rerank else score_blocks(queries, gallery, truth)
    return rank_blocks(blocks, truth)


def figures(ranking: Ranking, seed: int) -> dict[str, float]:
    """The accuracy of one model in percent, with its bootstrap interval."""
    low, high = ranking.map_interval(seed)
    values = {"map": ranking.map, "map_low": low, "map_high": high, "minp": ranking.minp}
    values |= {f"rank{rank}": ranking.rank(rank) for rank in (1, 5, 10)}
    return {name: round(value, 2) for name, value in values.items()}


def images_for(chain: Chain, data: str) -> Source:
    """The images that `data` names, as crops of the size that `chain` wants."""
    return open_source(sized(parse_source(data), chain.input.height, chain.input.width))


def size_of(text: str) -> tuple[int, int]:
    """Height and width in pixels, written as in `256x128`. Raises `DataError`."""
    match = re.fullmatch(r"([1-9][0-9]{1,3})x([1-9][0-9]{1,3})", text)
    if match is None:
        raise DataError(f"--input is '{text[:40]}'; write height and width in pixels, as in 256x128")
    return int(match[1]), int(match[2])


def width_of(chain: Chain, text: str) -> Width:
    """The width that `text` is in `chain`: a lone number has its teacher's multipliers."""
    return Width.parse(text, chain.teacher.multipliers)


def with_frontier(
    stored: StoredChain, source: Source, widths: Sequence[str], *, rerank: bool, seed: int, device: str
) -> StoredChain:
    """`stored` with a new frontier, of some `widths` only where they are named."""
    chain = stored.chain
    if widths:
        chosen = tuple(sorted({width_of(chain, text) for text in widths}))
        statistics = {width: chain.require_calibrated(width) for width in chosen}
        chain = replace(chain, ladder=chosen, statistics=statistics, frontier=None)
    trained_after = stored.chain.frontier is not None and stored.chain.frontier.trained_after_expansion
    reranking = Reranking() if rerank else None
    frontier = measure_frontier(chain, source.query, source.gallery, source.name, seed, reranking, device)
    return replace(stored, chain=replace(chain, frontier=replace(frontier, trained_after_expansion=trained_after)))


def across(stored: Sequence[StoredChain], names: Sequence[str], data: str, device: str) -> Iterator[str]:
    """mAP of queries of one chain against the gallery of another, all at full width, where they are as long."""
    dims = {one.chain.embedding_dim for one in stored}
    if len(stored) < 2 or len(dims) > 1:
        return
    sides = [_embedded(one.chain, images_for(one.chain, data), device) for one in stored]
    truth = images_for(stored[0].chain, data)
    maps = [[rank_sets(query, gallery, truth.query, truth.gallery).map for _, gallery in sides] for query, _ in sides]
    yield "mAP in percent at full width, queries of the row's chain in the gallery of the column's:"
    yield tables.matrix(names, names, [[f"{value:.1f}" for value in row] for row in maps])


def _embedded(chain: Chain, source: Source, device: str) -> tuple[Floats, Floats]:
    """Query and gallery embeddings in the common space, at the widest rung."""
    width = chain.ladder[-1]
    model, lift = load_student(chain, width).to(local_device(device)), chain.lift(width)
    query, gallery = (embed(model, images, chain.input)[:, lift] for images in (source.query, source.gallery))
    return query, gallery


def comparison_csv(reports: Sequence[Mapping[str, Any]]) -> str:
    """A row per chain and width."""
    text = io.StringIO()
    columns = ("chain", "digest", "dataset", "width", "macs", "params", "map", "map_low", "map_high", "rank1", "minp")
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for report in reports:
        for row in report["widths"]:
            low, high = row["map_ci95"]
            writer.writerow({**report, **row, "map_low": low, "map_high": high})
    return text.getvalue()


def write_plots(folder: Path, chain: Chain) -> None:
    if chain.frontier is None:
        raise ChainMismatch(f"chain '{chain.name}' has no frontier to draw")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.write_pictures(folder, chain, chain.frontier, None)


def read_recipe(path: Path) -> TrainRecipe:
    """A `TrainRecipe` from a TOML file. Raises `DataError` that names the file and the field."""
    try:
        return RecipeFile(train=from_toml(tomllib.loads(path.read_text(encoding="utf-8")))).train
    except ValidationError as error:
        raise DataError(f"{path}: {mistake_in(error).removeprefix('train.')}") from error
    except (OSError, ValueError, ChainsError) as error:
        raise DataError(f"{path}: {error}") from error


def described(stored: StoredChain) -> str:
    """A chain and its frontier in words."""
    return tables.report_text(pipeline.report_of(stored))


def require_free(path: Path) -> None:
    """Files are never overwritten."""
    if path.exists():
        raise DataError(f"{path} exists already; name another file")
    if not path.parent.is_dir():
        raise DataError(f"{path} cannot be written: there is no folder {path.parent}")
