"""The backbone in a plain mm config, trained by mmdet's own tool: no Ray, no pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import mmdet

TRAIN = Path(mmdet.__file__).parent / ".mim/tools/train.py"
CONFIG = """
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["elsa.mm"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="micro"),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes={classes}),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_classes={classes}),
    ),
)
metainfo = dict(classes={names})
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root="{place}/", metainfo=metainfo),
)
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2)
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
param_scheduler = []
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
"""
START = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_mmdets_own_tool_trains_the_backbone(tiny_data: Path, tmp_path: Path) -> None:
    place = tiny_data / "coco"
    names = json.loads((place / "manifest.json").read_text())["classes"]
    text = CONFIG
    for key, value in (("classes", len(names)), ("names", tuple(names)), ("place", place)):
        text = text.replace(f"{{{key}}}", str(value))
    (tmp_path / "mine.py").write_text(text)
    # A process of its own, where `pipelines` can't be imported.
    (tmp_path / "pipelines.py").write_text("raise ImportError('no pipeline here')\n")
    done = subprocess.run(
        [sys.executable, "-c", START, str(TRAIN), "mine.py", "--work-dir", "work"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "work/iter_2.pth").is_file()
