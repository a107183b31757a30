"""Data sets: a name or a folder in, splits with images and labels out."""

from smallfry.data.dataset import load_data
from smallfry.data.image_data import ImageData
from smallfry.data.named import NAMED, is_named
from smallfry.data.splits import Split

__all__ = ["NAMED", "ImageData", "Split", "is_named", "load_data"]
