"""The ImageNet-64 model at full size: OpenAI's file converted bit for bit, the output held against diffusers."""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import imagenet64_reference as reference
import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from parity import TOLERANCE, channels_last, relative_error

from mlx_cm.convert import Options, convert
from mlx_cm.model_folder import load_model
from mlx_cm.models.unet2d import IMAGENET_64


@pytest.fixture(scope="module")
def folder():
    """Gigabytes, so they go when the tests are done."""
    with tempfile.TemporaryDirectory() as made:
        subprocess.run([sys.executable, reference.__file__, made], check=True, timeout=600)
        yield Path(made)


def test_an_openai_file_at_full_size(folder):
    report = convert(folder / reference.CHECKPOINT, folder / "native", Options(preset="cd-imagenet64-l2"))
    assert (report.parameters, report.tensors) == (295_899_267, 629)
    model = load_model(folder / "native" / "unet", "float32")
    assert model.config == IMAGENET_64

    digests = json.loads((folder / reference.DIGESTS).read_text())
    ours = {name: hashlib.sha256(np.array(value).data).hexdigest() for name, value in tree_flatten(model.parameters())}
    assert ours == digests

    output = model(channels_last(reference.inputs()), mx.array([reference.TIME]), mx.array([reference.LABEL]))
    theirs = np.load(folder / reference.OUTPUT)
    assert relative_error(output, torch.from_numpy(theirs)) < TOLERANCE
    assert theirs.std() > 0.1  # a network that answers nothing would agree with anything
