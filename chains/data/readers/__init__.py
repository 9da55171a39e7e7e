"""Readers of person re-identification data sets: a folder as it was published, or your own, becomes a `DataSet`.

    dataset      what a reader returns, and what it can be asked for
    listing      files below the root of a data set, and nothing else
    labelled     rows of (file, person, camera, split) become a data set; the split where there is none
    market1501, msmt17, viper, folder, table    one layout each
    layouts      which layout a folder has, and the call that reads it

Nothing is ever written below the root, nothing outside it is read, and no image is opened: `chains.data.validation`
does that.
"""

from chains.data.readers.dataset import DataSet, ReadOptions
from chains.data.readers.layouts import KINDS, Detection, detect, read

__all__ = ["KINDS", "DataSet", "Detection", "ReadOptions", "detect", "read"]
