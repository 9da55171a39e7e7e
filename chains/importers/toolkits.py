"""The toolkits' names for convolutional networks: one table, read by `schemes`.

    torchreid    KaiyangZhou/deep-person-reid     ResNets, OSNet, OSNet-IBN, OSNet-AIN, MobileNetV2
    fast-reid    JDAI-CV/fast-reid                ResNets with and without IBN-a, OSNet; heads of three generations
    BoT          michuanhaohao/reid-strong-baseline
    MSINet       vimar-gu/MSINet                  with the interactions found on MSMT17
    OSKT         kiddo127/OSKT                    the teacher in the file of a refined chain; it has BoT's names
    ImageNet     torchvision, timm, IBN-Net       to begin with, not to teach people

The surprise is what no name shows: torchreid's ResNets halve the last map, BoT's stem has no ReLU, fast-reid's stem
pools without padding. Each is an architecture of its own; see `chains.architectures.resnet`.
"""

from __future__ import annotations

import re

from chains.architectures.mobilenetv2 import MOBILENETV2
from chains.architectures.msinet import MSINET
from chains.architectures.osnet import OSNETS
from chains.errors import WeightsRefused
from chains.importers.containers import State
from chains.importers.schemes import Scheme, array
from chains.importers.strangers import stranger

PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101")
IBN = tuple(f"{name}_ibn_a" for name in PLAIN)
RESNETS = (*PLAIN, *IBN)
TORCHVISION_PREFIXES = ("", "backbone.", "base.", "model.")
OUR_NECKS = ("neck.", "bottleneck.")


def _all(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
    return tuple(f"{name}_{suffix}" for name in names)


def _of_a_silent_block(tensors: State, name: str) -> str:
    """A non-local block adds W y to its input, through a norm that starts at zero. Raises `WeightsRefused` where
    training has moved it."""
    block = re.sub(r"(NL_\d\.\d+\.).*", r"\1", name)
    norm = [f"{block}W.1.{kind}" for kind in ("weight", "bias")]
    if not all(part in tensors and not array(part, tensors, []).any() for part in norm):
        raise WeightsRefused(f"{name}: {stranger(name)}. (One whose W.1 is zero would change nothing.)")
    return "a non-local block whose last norm is zero adds nothing"


def _of_an_average(tensors: State, name: str) -> str:
    """Generalised-mean pooling with power 1. Raises `WeightsRefused` for every other power."""
    power = array(name, tensors, []).reshape(-1)
    if power.tolist() != [1.0]:
        raise WeightsRefused(f"{name} is {power[:3].tolist()}: {stranger(name)}. (Power 1 would be the average.)")
    return "generalised-mean pooling with power 1 is average pooling"


FASTREID_BLOCKS = ((r"^backbone\.NL_\d\.\d+\.", _of_a_silent_block), (r"^heads\.pool_layer\.p$", _of_an_average))
CLASSIFIER_BIAS = (r"(^|\.)(classifier|fc)\.bias$", "the classifier's; classifiers here have none")
PADDED = "files with heads.bnneck are from before August 2020, when the stem's pooling was padded"
UNPADDED = "fast-reid's stem pools without padding since August 2020"
HALVED = "torchreid's ResNets have last stride 2"


def _fastreid(architectures: tuple[str, ...], neck: str, assumes: str | None) -> Scheme:
    return Scheme(
        "fast-reid",
        architectures,
        renames=(("", "backbone."),),
        necks=(f"heads.{neck}.",),
        marks=(f"heads.{neck}.running_mean", "backbone.conv1.weight"),
        classifiers=("heads.weight", "heads.classifier.weight"),
        examined=FASTREID_BLOCKS,
        assumes=assumes,
    )


def _torchvision(prefix: str) -> Scheme:
    """The names alone: whoever built the network, with our neck or BoT's or none."""
    return Scheme(
        "torchvision's names",
        RESNETS,
        renames=(("", prefix),),
        necks=tuple(f"{outer}{neck}" for outer in dict.fromkeys(("", prefix)) for neck in OUR_NECKS),
        marks=(f"{prefix}conv1.weight", f"{prefix}bn1.weight"),
        classifiers=tuple(f"{outer}{n}.weight" for n in ("classifier", "fc") for outer in dict.fromkeys(("", prefix))),
        ignored=(CLASSIFIER_BIAS,),
    )


TORCHREID = (
    Scheme(
        "torchreid",
        _all(RESNETS, "stride2"),
        marks=("conv1.weight", "bn1.running_mean", "classifier.weight", "classifier.bias"),
        bars=OUR_NECKS,
        classifiers=("classifier.weight",),
        ignored=(CLASSIFIER_BIAS,),
        assumes=HALVED,
    ),
    Scheme(
        "torchreid",
        _all(RESNETS, "fc512"),
        marks=("conv1.weight", "fc.0.weight"),
        necks=("neck.",),
        classifiers=("classifier.weight",),
        ignored=(CLASSIFIER_BIAS,),
    ),
    Scheme(
        "torchreid",
        (*OSNETS, MOBILENETV2),
        marks=("conv1.conv.weight",),
        necks=("neck.",),
        classifiers=("classifier.weight",),
        ignored=(CLASSIFIER_BIAS,),
    ),
)
FASTREID = (
    _fastreid(_all(RESNETS, "fastreid"), "bottleneck.0", UNPADDED),
    _fastreid(RESNETS, "bnneck", PADDED),
    Scheme(
        "fast-reid",
        _all(RESNETS, "fastreid"),
        renames=(("reduction.", "heads.bottleneck."), ("", "backbone.")),
        necks=("heads.bottleneck.1.",),
        marks=("heads.bottleneck.1.running_mean", "backbone.conv1.weight"),
        classifiers=("heads.weight", "heads.classifier.weight"),
        examined=FASTREID_BLOCKS,
        embedding="heads.bottleneck.0.weight",
        assumes=UNPADDED,
    ),
    Scheme(
        "fast-reid",
        tuple(OSNETS),
        renames=(("", "backbone."),),
        necks=("heads.bottleneck.0.", "heads.bnneck."),
        marks=("backbone.conv1.conv.weight",),
        classifiers=("heads.weight", "heads.classifier.weight"),
        examined=FASTREID_BLOCKS,
        identities=("fc.",),
    ),
)
BOT = (
    Scheme(
        "BoT",
        _all(PLAIN, "bot"),
        renames=(("", "base."),),
        necks=("bottleneck.",),
        marks=("base.conv1.weight", "base.bn1.running_mean"),
        bars=("neck.", "base.neck.", "base.bottleneck."),
        classifiers=("classifier.weight",),
        ignored=(CLASSIFIER_BIAS, (r"^base\.fc\.", "an ImageNet classifier that nothing reads")),
        assumes="BoT's ResNets have no ReLU behind the stem's norm, those with IBN-a do",
    ),
    Scheme(
        "BoT",
        IBN,
        renames=(("", "base."),),
        necks=("bottleneck.",),
        marks=("base.conv1.weight", "base.layer1.0.bn1.IN.weight"),
        bars=("neck.", "base.neck.", "base.bottleneck."),
        classifiers=("classifier.weight",),
        ignored=(CLASSIFIER_BIAS, (r"^base\.fc\.", "an ImageNet classifier that nothing reads")),
    ),
)
MSINETS = (
    Scheme(
        "MSINet",
        (MSINET,),
        necks=("neck.",),
        marks=("conv1.conv.weight", "cells.0.conv1a.conv.weight"),
        ignored=(
            (r"^(f_)?(fc|head|classifier)\.", "behind the embedding; its authors' tests in other domains read it"),
            (r"^align_module\.", "of the loss that aligns domains in training"),
        ),
        assumes="branches that change places have no tensors, and are those found on MSMT17",
    ),
)
IMAGENET = (
    Scheme(
        "torchvision",
        _all(RESNETS, "stride2"),
        marks=("conv1.weight", "bn1.weight", "fc.weight"),
        bars=(*OUR_NECKS, "classifier."),
        classifiers=("fc.weight",),
        ignored=(CLASSIFIER_BIAS,),
        assumes="torchvision's ResNets have last stride 2",
    ),
)
OSKT = (
    Scheme(
        "OSKT",
        ("resnet50",),
        renames=(("", "base."),),
        necks=("bottleneck.",),
        marks=("base.conv1.weight", "base.GeneChain.conv1.weight"),
        classifiers=("classifier.weight",),
        ignored=(
            (
                r"\.GeneChain\.|\.Gene_Bottleneck\.|^GeneNet_",
                "of the weight chain beside it, which `widthwise import-chain` reads",
            ),
        ),
    ),
)
SCHEMES: tuple[Scheme, ...] = (
    *OSKT,
    *TORCHREID,
    *FASTREID,
    *BOT,
    *MSINETS,
    *IMAGENET,
    *map(_torchvision, TORCHVISION_PREFIXES),
)


def own(name: str) -> Scheme:
    """Our own names for the architecture `name`, as `chains.export` writes them."""
    return Scheme("widthwise", (name,), necks=("neck.",), classifiers=("classifier.weight",))
