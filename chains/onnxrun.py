"""ONNX files of this program, run in onnxruntime on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from chains.chain import Floats
from chains.data.images import Images, chunks
from chains.errors import ChainFileError


class OnnxModel:
    """An ONNX file of this program, run on the CPU. Raises `ChainFileError` for files without our metadata."""

    def __init__(self, path: Path) -> None:
        try:
            self.session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has an exception class for every kind of broken file
            raise ChainFileError(f"'{path}' is no ONNX file that runs: {error}") from error
        marks = self.session.get_modelmeta().custom_metadata_map
        try:
            self.height, self.width = (int(side) for side in marks["reid.input_size"].split("x"))
            self.mean, self.std = (np.array(json.loads(marks[f"reid.{name}"]), np.float32) for name in ("mean", "std"))
        except (KeyError, ValueError) as error:
            raise ChainFileError(f"'{path}' lacks the metadata of a model of this program: {error}") from error
        self.takes_pixels = self.session.get_inputs()[0].type == "tensor(uint8)"

    def embed(self, images: Images) -> Floats:
        outputs = [self.session.run(None, {"images": self._input(pixels)})[0] for pixels in chunks(images, 64)]
        embedded: Floats = np.concatenate(outputs)
        return embedded

    def _input(self, pixels: Any) -> Any:
        if self.takes_pixels:
            return pixels
        scaled = (pixels.astype(np.float32) / np.float32(255) - self.mean) / self.std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
