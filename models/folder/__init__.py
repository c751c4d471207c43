"""Folders in Hugging Face's format: config.json, safetensors, tokenizer.json."""

from models.folder.errors import FolderError
from models.folder.load import from_pretrained, read_config
from models.folder.save import save_pretrained
from models.folder.tokenizer import load_tokenizer

__all__ = ["FolderError", "from_pretrained", "load_tokenizer", "read_config", "save_pretrained"]
