"""What a file is, for `widthwise inspect`: chains, networks, ONNX models, other people's weights, gene matchers.

    describe(path)   the answer as JSON values
    text_of(found)   the same for people: facts, costs per width, channel groups

The kind is found in the content, whatever the file is called. Nothing is unpickled, nothing is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import onnx
from safetensors import SafetensorError, safe_open

from chains import artifact, export, tables
from chains.arch import Architecture
from chains.artifact import StoredChain
from chains.chain import InputSpec
from chains.cost import Costs, count_macs, count_params, peak_activation_bytes
from chains.errors import ChainFileError, ChainsError, WeightsRefused
from chains.importers.check import USUAL_INPUT
from chains.importers.containers import State, read_safetensors, read_torch, sniff
from chains.importers.frozen import read_graph
from chains.importers.oskt_chains import read_matcher
from chains.importers.recognise import recognise
from chains.onnxfile import plan
from chains.pipeline import load_chain
from chains.width import Width

Facts = dict[str, Any]
GENES = re.compile(r"(^|\.)GeneChain\.|_gene(\.|$)")  # what OSKT's authors call the rows of their chains
SHOWN = 4  # names in a line; the JSON has them all
MAX_CELL = 2000  # characters of a value or name in the text
MAX_NESTING = 32  # of JSON in an ONNX file's metadata; ours has two levels
TABLES = ("widths", "groups", "layers")


def describe(path: Path) -> Facts:
    """What `path` is, as JSON values: `what` names the kind, and what follows is the kind's own.

    Raises `ChainFileError` or `WeightsRefused`, with the reason, for what is nothing of this field or broken."""
    if not path.is_file():
        raise ChainFileError(f"{path} is no file; name a chain, a network's weights, an ONNX file or a gene matcher")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        found = _content(path)
    except ChainsError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error
    return {"file": path.name, "what": found.pop("what"), "size_bytes": path.stat().st_size, "sha256": digest, **found}


def _content(path: Path) -> Facts:
    if _begins_as_json(path):
        return _gene_matcher(path)
    match sniff(path):
        case "onnx":
            return _onnx(path)
        case "torch":
            return _checkpoint(read_torch(path), "torch")
        case "safetensors":
            return _safetensors(path)


def _begins_as_json(path: Path) -> bool:
    """Whether the first thing in the file is an object: not so a safetensors file, which begins with a length."""
    with path.open("rb") as file:
        start = file.read(64)
    return start.lstrip()[:1] == b"{" and b"\0" not in start


# --- safetensors: chains, networks, and other people's


def _safetensors(path: Path) -> Facts:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ChainFileError(f"{path}: cannot be read as safetensors: {error}") from error
    if artifact.METADATA_KEY in metadata:
        return _chain(load_chain(path))
    if export.METADATA_KEY in metadata:
        return _network(path)
    state, _ = read_safetensors(path)
    return _checkpoint(state, "safetensors")


def _chain(stored: StoredChain) -> Facts:
    chain = stored.chain
    return {
        "what": "weight chain",
        "name": chain.name,
        "architecture": chain.architecture,
        "mode": chain.mode,
        "teacher": str(chain.teacher),
        "ladder": [str(width) for width in chain.ladder],
        "input": asdict(chain.input),
        "embedding_dim": chain.embedding_dim,
        "embedding_space": chain.embedding_space,
        "license": chain.license,
        "dataset": None if chain.frontier is None else chain.frontier.dataset,
        "provenance": dict(chain.provenance),
        "widths": [_rung(stored, width) for width in chain.ladder],
        "groups": list(_groups(chain.table, chain.teacher, chain.ladder[0])),
    }


def _rung(stored: StoredChain, width: Width) -> Facts:
    """What a width of a chain costs and how well it was measured to retrieve; without statistics it has no file."""
    chain = stored.chain
    measured = chain.frontier.of(width) if chain.frontier else None
    is_calibrated = width in chain.statistics
    return {
        **_costs(chain.table, width, chain.input),
        "artifact_bytes": plan(stored, width).total_bytes if is_calibrated else None,
        "is_calibrated": is_calibrated,
        "map": None if measured is None else measured.map,
        "rank1": None if measured is None else measured.rank1,
    }


def _costs(table: Architecture, width: Width, input: InputSpec) -> Facts:
    macs, params = count_macs(table, width, input), count_params(table, width)
    costs = Costs(macs, params, peak_activation_bytes(table, width, input), artifact_bytes=0)
    return {
        "width": str(width),
        "macs": macs,
        "params": params,
        "peak_activation_bytes": costs.peak_activation_bytes,
        "memory_bytes_bound": costs.memory_bytes_bound,
    }


def _groups(table: Architecture, full: Width, narrowest: Width) -> Iterator[Facts]:
    """The channel groups: which tensors' rows and columns are cut together, from how many channels to how many."""
    rows, columns = defaultdict(list), defaultdict(list)
    for tensor, axes in table.axes.items():
        for group in dict.fromkeys(axes.rows):
            rows[group].append(tensor)
        for group in dict.fromkeys(axes.columns or ()):
            columns[group].append(tensor)
    most, least = table.group_sizes(full), table.group_sizes(narrowest)
    for group in table.groups:
        yield {
            "group": group,
            "channels": most[group],
            "narrowest": least[group],
            "written_by": list(table.writers(group)),
            "rows_of": rows[group],
            "columns_of": columns[group],
        }


def _network(path: Path) -> Facts:
    exported = export.read_exported(path)
    mark, model = exported.origin, exported.model
    stated = {name: getattr(mark, name) for name in ("license", "chain", "chain_digest", "embedding_space")}
    return {
        "what": f"{mark.kind} network",
        "architecture": mark.architecture,
        "width": mark.width,
        "input": asdict(mark.input),
        "embedding_dim": model.table.embedding_dim(model.width),
        "identities": None if exported.classifier is None else exported.classifier.shape[0],
        **stated,
        "widths": [_costs(model.table, model.width, mark.input)],
        "groups": list(_groups(model.table, model.width, model.width)),
    }


def _checkpoint(state: State, format: str) -> Facts:
    """Somebody else's weights, as an import would take them. Raises `WeightsRefused` with the first mismatch."""
    if genes := [name for name in state if GENES.search(name)]:
        return _gene_chain(state, genes)
    found = recognise(state)
    model, table = found.model, found.model.table
    height, width = table.input_size or (USUAL_INPUT.height, USUAL_INPUT.width)
    mean, std = found.pixels or (USUAL_INPUT.mean, USUAL_INPUT.std)
    spec = InputSpec(height, width, mean, std)
    return {
        "what": "checkpoint",
        "format": format,
        "toolkit": found.toolkit,
        "architecture": table.name,
        "width": str(model.width),
        "input": asdict(spec),
        "embedding_dim": table.embedding_dim(model.width),
        "has_neck": found.neck,
        "identities": None if found.classifier is None else found.classifier.shape[0],
        "is_teacher": found.pretraining is None,
        "reason": found.pretraining,
        "tensors": len(state),
        "matched": found.matched,
        "missing": list(found.missing),
        "ignored": list(found.ignored),
        "notes": list(found.notes),
        "widths": [_costs(table, model.width, spec)],
        "groups": list(_groups(table, model.width, model.width)),
    }


# --- ONNX


def _onnx(path: Path) -> Facts:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's classes have no types
        raise WeightsRefused("the file cannot be read as ONNX; it may be cut short or damaged") from error
    marks = {entry.key: entry.value for entry in model.metadata_props}
    graph = {
        "opset": max((entry.version for entry in model.opset_import), default=None),
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "params": sum(prod(tensor.dims) for tensor in model.graph.initializer if tensor.data_type in _FLOATS),
        "operators": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    }
    if "widthwise.recipe" in marks:
        recipe = _parsed(marks["widthwise.recipe"])
        stated = {key: _parsed(value) for key, value in marks.items() if key != "widthwise.recipe"}
        return {"what": "model of a chain", **graph, "metadata": stated, "recipe": recipe}
    return {"what": "ONNX graph", **graph, "metadata": marks, **_as_teacher(path)}


_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}


def _value(value: onnx.ValueInfoProto) -> str:
    """`images: float [batch, 3, 256, 128]`."""
    kind, known = value.type.tensor_type, onnx.TensorProto.DataType
    type_name = known.Name(kind.elem_type).lower() if kind.elem_type in known.values() else f"type {kind.elem_type}"
    sides = ", ".join(dim.dim_param or (str(dim.dim_value) if dim.dim_value else "?") for dim in kind.shape.dim)
    return f"{value.name}: {type_name} [{sides}]"


def _parsed(text: str) -> Any:
    """A metadata value: JSON where it is some and can be written again, else the text."""
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value if _is_shallow(value, MAX_NESTING) else text


def _is_shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in inner)


def _as_teacher(path: Path) -> Facts:
    """Whether the graph could be a frozen teacher, and why not."""
    try:
        read_graph(path)
    except WeightsRefused as error:
        return {"is_teacher": False, "reason": str(error)}
    return {"is_teacher": True}


# --- chains of OSKT's authors


def _gene_chain(state: State, genes: Sequence[str]) -> Facts:
    """The half of such a chain that holds its tensors."""
    return {
        "what": "weights of an OSKT chain",
        "family": "ResNet" if any("GeneChain." in name for name in genes) else "ViT",
        "tensors": len(state),
        "genes": len(genes),
        "notes": ["`widthwise import-chain` reads it together with its gene matcher, a JSON file beside it"],
    }


def _gene_matcher(path: Path) -> Facts:
    """The partition that belongs to a chain of OSKT's authors (methods/oskt.md §2): layer -> a label per channel, for a
    ViT under `o2g`."""
    content = read_matcher(path)
    is_vit = isinstance(content.get("o2g"), dict)
    labels = content["o2g"] if is_vit else content
    if not labels or not all(_are_labels(found) for found in labels.values()):
        raise ChainFileError(
            f"JSON with {_some([repr(key) for key in content]) or 'nothing'} in it; the one JSON file known here is "
            "OSKT's gene matcher: layer names, each with a list of labels, one per channel"
        )
    layers = [{"layer": n, "channels": len(found), "clusters": len(set(found))} for n, found in labels.items()]
    return {"what": "gene matcher", "family": "ViT" if is_vit else "ResNet", "layers": layers}


def _are_labels(found: object) -> bool:
    return isinstance(found, list) and bool(found) and all(type(label) is int and label >= 0 for label in found)


# --- for people


def text_of(found: Facts) -> str:
    """What `describe` found as aligned text. Long lists of names and long values are cut short; the JSON has them all.
    Names and values of the file are printable."""
    facts = {name: value for name, value in found.items() if name not in TABLES}
    parts = [_cell(f"{found['file']}: {found['what']}"), _columns(_flat(facts))]
    if widths := found.get("widths"):
        parts.append(_widths_text(widths))
    if groups := found.get("groups"):
        parts.append("channels that are cut together:")
        parts.append(_columns(_group_rows(groups)))
    if layers := found.get("layers"):
        rows = [[layer["layer"], str(layer["channels"]), str(layer["clusters"])] for layer in layers]
        parts.append(_columns([["layer", "channels", "clusters"], *rows]))
    return "\n\n".join(parts)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values in words, inner ones under dotted names; what is not known is left out."""
    rows: list[list[str]] = []
    for name, value in facts.items():
        if name == "operators":
            rows.append([name, ", ".join(f"{operator} ×{count}" for operator, count in value.items())])
        elif isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ()) and (prefix or name not in ("file", "what")):
            rows.append([f"{prefix}{name}", _in_words(value)])
    return rows


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        texts = [str(one) for one in value]
        return ", ".join(texts) if all(len(text) <= 12 for text in texts) else _some(texts)
    return str(value)


def _widths_text(widths: Sequence[Mapping[str, Any]]) -> str:
    """Costs for one image, and where it was measured mAP in percent."""
    head = {"width": "width", "macs": "MACs", "params": "params", "artifact_bytes": "ONNX bytes"}
    head |= {"memory_bytes_bound": "memory bytes", "map": "mAP %"}
    kept = [name for name in head if any(row.get(name) is not None for row in widths)]
    rows = [["-" if row.get(name) is None else _in_words(row[name]) for name in kept] for row in widths]
    return tables.text_table([[head[name] for name in kept], *rows])


def _group_rows(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for every group; blocks of one layer, which are of one size, share a line: `blocks.0.attn.0 ×6`."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for group in groups:
        alike[tuple(group["written_by"])].append(group)
    rows = [["group", "channels", "narrowest", "rows of", "columns of"]]
    for blocks in alike.values():
        first, count = blocks[0], len(blocks)
        name = first["group"] if count == 1 else f"{first['group']} ×{count}"
        layers = (_some(_layers(first[side])) or "-" for side in ("written_by", "columns_of"))
        rows.append([name, f"{first['channels']:,}", f"{first['narrowest']:,}", *layers])
    return rows


def _layers(tensors: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(tensor.removesuffix(".weight") for tensor in tensors))


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(name[:80] for name in names[:SHOWN]) + more


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines with left-aligned columns."""
    shown = [[_cell(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*shown, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(line.rstrip() for line in lines)


def _cell(text: str) -> str:
    shown = tables.printable(text[:MAX_CELL])
    return f"{shown}…" if len(text) > MAX_CELL else shown
