"""Backbones: plain torch modules that take their widths and know nothing of chains."""
