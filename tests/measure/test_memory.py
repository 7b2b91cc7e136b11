import subprocess
import sys

import pytest
import torch

from retnet.measure.memory import Watch, in_bytes, kept_for_backward
from retnet.mixers import SoftmaxAttention, SoftmaxConfig

MIB = 2**20


def test_a_watch_sees_what_came_and_went():
    watch = Watch(torch.device("cpu"))
    held = torch.ones(64 * MIB // 4)
    passing = torch.ones(64 * MIB // 4)
    del passing
    assert 60 * MIB < watch.held() < 100 * MIB
    assert 120 * MIB < watch.peak() < 160 * MIB
    del held
    assert watch.held() < 20 * MIB
    assert watch.peak() > 120 * MIB


def test_a_new_watch_forgets_earlier_peaks():
    large = torch.ones(64 * MIB // 4)
    del large
    assert Watch(torch.device("cpu")).peak() < 20 * MIB


GAPS = """
import torch
from retnet.host import map_large_tensors
from retnet.measure.memory import Watch

map_large_tensors()
MIB = 2**20
threshold = torch.ones(16 * MIB // 4)
del threshold  # malloc would now take as much from its heap
watch = Watch(torch.device("cpu"))
some = [torch.ones(8 * MIB // 4) for _ in range(16)]
del some[::2]
others = [torch.ones(16 * MIB // 4) for _ in range(4)]  # no gap is wide enough
print(watch.peak() // MIB)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is told")
@pytest.mark.slow
def test_gaps_between_tensors_do_not_count():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert 125 < int(done.stdout) < 145, done


def test_kept_counts_each_storage_once_and_no_weights():
    x, weight = torch.randn(100, 50, requires_grad=True), torch.nn.Parameter(torch.randn(50, 50))
    assert kept_for_backward(lambda: x @ weight, [weight]) == x.nbytes
    assert kept_for_backward(lambda: (x @ weight) + (x @ weight.mT), [weight]) == x.nbytes
    assert kept_for_backward(lambda: x + 1, []) == 0


def test_plain_attention_keeps_its_scores_and_flash_does_not():
    T, H = 96, 2
    kept = {}
    for sdpa in ("math", "flash"):
        mixer = SoftmaxAttention(32, SoftmaxConfig(num_heads=H, sdpa=sdpa))
        x = torch.randn(1, T, 32, requires_grad=True)
        kept[sdpa] = kept_for_backward(lambda mixer=mixer, x=x: mixer(x), mixer.parameters())
    scores = H * T * T * 4
    assert kept["math"] > scores > kept["flash"]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (96, "96 bytes"), (2048, "2 KiB"), (2**29, "0.5 GiB"), (3e10, "27.9 GiB")],
)
def test_bytes_read_well(nbytes, text):
    assert in_bytes(nbytes) == text
