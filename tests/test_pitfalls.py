"""What users of other libraries complain about, one test each: named after the failure, with the reports of it."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tempfile

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import reference
from .cases import random_logits
from .checks import assert_within
from .conftest import CPP_IS_LIVE


def grad(loss, z):
    return torch.autograd.grad(loss, z)[0]


def test_logits_are_not_overwritten_by_their_gradient(backend):
    """Liger#272, #343, #1251; unsloth#5002."""
    z = random_logits(4, 500).requires_grad_()
    before, version = z.detach().clone(), z._version
    s = fastcalib.statistics(z, torch.tensor([0, 1, 2, 3]), backend=backend)
    (s.log_prob.sum() + fastcalib.softmax(z, backend=backend).square().sum()).backward()
    assert torch.equal(z.detach(), before) and z._version == version
    assert z.grad.data_ptr() != z.data_ptr()


def test_reduction_none_has_right_gradients(backend):
    """Liger#968, #1298: a different upstream gradient for each row."""
    z, ids = random_logits(5, 300), torch.tensor([3, 0, 299, 7, 7])
    weight = torch.tensor([1.0, 0.0, -2.5, 1e-3, 40.0])
    got = z.clone().requires_grad_()
    (-fastcalib.statistics(got, ids, backend=backend).log_prob * weight).sum().backward()
    want = z.double().requires_grad_()
    (torch.nn.functional.cross_entropy(want, ids, reduction="none") * weight).sum().backward()
    assert_within(got.grad, want.grad, 4e-6 * weight.abs()[:, None].double().expand_as(want) + 1e-12, "gradient")
    assert (got.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_not_rounded(backend, dtype):
    """CCE#14, TransformerEngine#3193, Liger#1391: a bfloat16 loss has three digits."""
    z, ids = random_logits(64, 32_000, dtype=dtype), torch.arange(64) * 400
    s = fastcalib.statistics(z, ids, backend=backend)
    assert s.log_prob.dtype == s.entropy.dtype == torch.float32
    want = torch.log_softmax(z.double(), -1).gather(1, ids[:, None])[:, 0]
    assert_within(s.log_prob, want, 2e-6 * want.abs().clamp(min=1), "log_prob")


def test_masked_tokens_give_no_nan_in_entropy_or_backward(backend):
    """trl#7221, #7252; SkyRL#2259; VeOmni#720."""
    for mask_value in (-torch.inf, torch.finfo(torch.float32).min):
        z = random_logits(3, 400)
        z[:, ::2] = mask_value
        z.requires_grad_()
        s = fastcalib.statistics(z, torch.tensor([1, 3, 5]), [1.0, 0.1], backend=backend)
        g = grad(s.entropy.sum() + s.log_prob.sum() + s.collision.sum() + s.var_logit.sum() + s.max_prob.sum(), z)
        assert s.entropy.isfinite().all() and g.isfinite().all()
        assert (g[:, ::2] == 0).all()
        alone = fastcalib.statistics(z[:, 1::2].detach().contiguous(), temperature=[1.0, 0.1], backend=backend)
        torch.testing.assert_close(s.entropy, alone.entropy, rtol=2e-6, atol=2e-6)


def test_no_positive_log_probabilities_where_all_logits_are_negative(backend):
    """verl#2656 (log-probs of +123): a maximum that starts at 0; verl#7439, SkyRL#2141: padding in the sum."""
    z = random_logits(3, 5_000) - 500
    s = fastcalib.statistics(z, torch.tensor([0, 1, 2]), backend=backend)
    assert (s.log_prob < 0).all() and (s.max_prob <= 1).all()
    want = reference.statistics(z, 1.0, [[0], [1], [2]])
    assert_within(s.log_prob, want.log_prob[:, 0], 4e-5, "log_prob")
    padded = torch.cat([z, torch.zeros(3, 267)], -1)  # zeros are e^500 times as likely
    p = fastcalib.statistics(padded, torch.tensor([0, 1, 2]), vocab_size=5_000, backend=backend)
    torch.testing.assert_close(p.log_prob, s.log_prob)


@pytest.mark.parametrize("t", [1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_probabilities_sum_to_one_at_low_temperature_and_large_offset(backend, t, offset):
    """flashinfer#5088 (p = 1.0013 at T = 1e-3), pytorch#195829, OpenRLHF#1319, vllm#22180."""
    z = random_logits(4, 32_000) + offset
    p = fastcalib.softmax(z, t, backend=backend).double()
    assert_within(p.sum(-1), torch.ones(4), 1e-6, "sum")
    s = fastcalib.statistics(z, z.argmax(-1), t, backend=backend)
    assert (s.max_prob <= 1).all() and (s.log_prob <= 0).all()
    assert_within(s.max_prob, p.amax(-1), 1e-6, "max_prob")


def test_int32_overflow_of_row_offsets(cpp_backend):
    """fla#1080, #1082; mamba#1015; pytorch#111484; trl#7266. More in test_edge_cases.py."""
    try:
        z = torch.empty_strided((2, 100), (2**31 + 64, 1), dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve untouched memory: {error}")
    z[0], z[1] = -1.0, torch.arange(100.0).half() / 50
    s = fastcalib.statistics(z, backend=cpp_backend)
    assert s.argmax.tolist() == [0, 99]


def test_shifted_logits_are_read_in_place_and_right(backend):
    """TransformerEngine#2734, unsloth#10713 (36 of 42 layouts), Automodel#3854. The grid is in test_statistics.py."""
    z = random_logits(2, 7, 100).requires_grad_()
    ids = torch.randint(0, 100, (2, 7))
    loss = -fastcalib.statistics(z[:, :-1], ids[:, 1:], backend=backend).log_prob.mean()
    want = torch.nn.functional.cross_entropy(z[:, :-1].reshape(-1, 100), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad(loss, z), grad(want, z), rtol=1e-5, atol=1e-8)


def test_one_graph_whatever_the_temperature(backend):
    """Liger#96, axolotl#3788, vllm#38933. More in test_registration.py."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, t: fastcalib.statistics(z, temperature=t, backend=backend).entropy, fullgraph=True, backend="eager"
    )
    z = random_logits(2, 64)
    for t in (0.5, 0.75, 1.5, 2.5):
        torch.testing.assert_close(compiled(z, t), fastcalib.statistics(z, temperature=t, backend=backend).entropy)


def test_autocast_changes_nothing(backend):
    """Liger#305, #501, #502."""
    z = random_logits(3, 200)
    plain = fastcalib.statistics(z, torch.tensor([0, 1, 2]), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fastcalib.statistics(z, torch.tensor([0, 1, 2]), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside) if a is not None)


def test_greater_is_not_greater_or_equal(backend):
    """vllm#7627, #7899, #21283: a rank that counts ties without saying so."""
    z = torch.tensor([[2.0, 1.0, 2.0, 2.0, 0.0]])
    r = fastcalib.ranks(z, torch.tensor([[0, 1, 4]]), backend=backend)
    assert r.n_greater.tolist() == [[0, 3, 4]] and r.n_equal.tolist() == [[2, 0, 0]]


def peak_growth(code: str) -> float:
    """MiB by which a statement raises the peak memory of a fresh process after a warm-up on the same shapes."""
    script = f"""
import resource, torch, fastcalib
torch.set_num_threads(2)
big = torch.zeros(64, 128_256)
ids, many = torch.zeros(64, 16, dtype=torch.long), torch.linspace(-5, 5, 1000).expand(64, -1)
def run(z, ids, many):
    {code}
run(big[:2], ids[:2], many[:2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(big, ids, many)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    away = tempfile.gettempdir()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=away)
    return float(result.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not CPP_IS_LIVE, reason="the C++ kernels, measured as Linux does")
@pytest.mark.parametrize(
    "code",
    [
        "fastcalib.statistics(z, ids, [0.5, 1.0, 2.0], ranks=True, backend='cpp')",
        "fastcalib.ranks(z, thresholds=many, temperature=1.0, backend='cpp')",
    ],
)
def test_no_temporaries_of_the_size_of_the_vocabulary(code):
    """vllm#7899, #5907, #52054; lm-evaluation-harness#3654; trl#4013: boolean masks, full softmaxes. Logits: 31 MiB."""
    grown = peak_growth(code)
    assert grown < 8, f"{grown:.1f} MiB for results of less than 1 MiB"


def test_results_do_not_depend_on_the_batch(cpp_backend):
    """pytorch#181574, RL-Kernel#199. More in test_determinism.py."""
    z = random_logits(100, 3_000, dtype=torch.bfloat16)
    together = fastcalib.statistics(z, torch.zeros(100, dtype=torch.long), backend=cpp_backend)
    for i in (0, 50, 99):
        alone = fastcalib.statistics(z[i : i + 1], torch.zeros(1, dtype=torch.long), backend=cpp_backend)
        assert torch.equal(alone.log_prob, together.log_prob[i : i + 1])
        assert torch.equal(alone.entropy, together.entropy[i : i + 1])


def test_confidences_of_exactly_zero_and_one_exist(backend):
    """torchmetrics#3510, #1646: edges that fall into no bin. Here: that they are exact, not 1 + 1e-7."""
    z = torch.full((1, 50), -1e4)
    z[0, 7] = 1e4
    s = fastcalib.statistics(z, torch.tensor([7]), backend=backend)
    assert s.max_prob.item() == 1.0 and s.log_prob.item() == 0.0 and 0 <= s.entropy.item() < 1e-30
    assert fastcalib.softmax(z, backend=backend)[0, [0, 7]].tolist() == [0.0, 1.0]


def test_probabilities_given_as_logits_are_taken_as_logits(backend):
    """torchmetrics guesses from the range: numbers in [0, 1] are logits like any other."""
    z = torch.rand(2, 20)
    z = z / z.sum(-1, keepdim=True)
    s = fastcalib.statistics(z, backend=backend)
    torch.testing.assert_close(s.logsumexp, torch.logsumexp(z, -1))
    for function in (fastcalib.statistics, fastcalib.ranks, fastcalib.softmax, fastcalib.log_softmax):
        assert next(iter(inspect.signature(function).parameters)) == "logits"


def test_a_mask_by_the_tokenizer_and_padded_logits(backend):
    """xgrammar#694: logits of 151,936 columns, a tokenizer of 151,669 tokens."""
    z = random_logits(1, 300)
    full = torch.full((1, 9), -1, dtype=torch.int32)  # 288 bits for 270 tokens
    sets = ValidSets.from_bitmask(full, 270)
    s = fastcalib.statistics(z, sets, vocab_size=270, backend=backend)
    assert s.log_prob.shape == (270,)
    torch.testing.assert_close(s.log_prob.exp().sum(), torch.tensor(1.0))


def test_the_fast_path_is_not_silently_off():
    """trl#7253. The rest is in test_backends.py."""
    live, why = fastcalib.backends()["cpp"]
    assert ("instruction set" in why) if live else ("could not be imported" in why)


def test_small_inputs_go_through_plain_registration():
    """TensorRT-LLM#13149, quack: custom_op doubles the call overhead; the operations are Library.define'd."""
    from fastcalib.ops._library import LIBRARY

    assert isinstance(LIBRARY, torch.library.Library)
    names = {
        n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastcalib::")
    }
    assert names >= {"statistics", "statistics_backward", "ranks", "softmax", "softmax_backward"}
