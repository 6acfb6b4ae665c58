"""Images with label maps, as mmseg's data set."""

from pathlib import Path
from typing import Any

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from pipelines.data.layout import IMAGES


@DATASETS.register_module()
class LabelMapDataset(BaseSegDataset):
    """mmseg's, with images of all kinds that the checks admit, and classes of any names.

    `ADE20KDataset` knows only its own 150 classes.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(seg_map_suffix=".png", reduce_zero_label=True, **arguments)

    def load_data_list(self) -> list[dict[str, Any]]:
        files = Path(self.data_prefix["img_path"]).iterdir()
        found: list[dict[str, Any]] = []
        for self.img_suffix in sorted({f.suffix for f in files if f.suffix.lower() in IMAGES}):
            found += super().load_data_list()
        return sorted(found, key=lambda item: str(item["img_path"]))
