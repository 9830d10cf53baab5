"""The same model on a CUDA device; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diymodel import DIYConfig, DIYForCausalLM, next_token_loss
from diymodel.checkpoint import load_checkpoint, load_pretrained, save_checkpoint, save_pretrained

pytestmark = pytest.mark.gpu

CONFIG = DIYConfig(
    vocab_size=97, num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=2, max_seq_len=128, dropout=0.0
)
LENGTHS = torch.tensor([5, 17, 11])


def models(dtype: torch.dtype) -> tuple[DIYForCausalLM, DIYForCausalLM]:
    """One model on the CPU, the same on the GPU, with weights sharp enough to matter."""
    torch.manual_seed(0)
    cpu = DIYForCausalLM(CONFIG).to(dtype).eval()
    with torch.no_grad():
        for weight in cpu.parameters():
            if weight.dim() == 2:
                weight.normal_(std=2 / weight.shape[1] ** 0.5)
    gpu = DIYForCausalLM(CONFIG).to("cuda", dtype).eval()
    gpu.load_state_dict(cpu.state_dict())
    return cpu, gpu


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_gpu_agrees_with_cpu(ids: torch.Tensor, dtype: torch.dtype, relative: float) -> None:
    cpu, gpu = models(dtype)
    with torch.no_grad():
        expected, seen = cpu(ids), gpu(ids.cuda()).cpu()
    assert (seen - expected).abs().max() <= relative * expected.abs().max()


def test_cached_equals_uncached_in_chunks_and_ragged_rows(ids: torch.Tensor) -> None:
    _, model = models(torch.float64)
    ids = ids.cuda()
    full = model(ids)
    past, chunks = None, []
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20), (20, 24)):
        logits, past = model(ids[:, start:end], past_key_values=past, use_cache=True)
        chunks.append(logits)
    torch.testing.assert_close(torch.cat(chunks, 1), full, atol=1e-10, rtol=1e-10)

    lengths = LENGTHS.cuda()
    logits, past = model(ids[:, :17], seq_lengths=lengths, use_cache=True, logits_to_keep=1)
    rows = torch.arange(3, device="cuda")
    torch.testing.assert_close(logits[:, 0], full[rows, lengths - 1], atol=1e-10, rtol=1e-10)
    for step in range(4):
        logits, past = model(ids[rows, lengths + step][:, None], past_key_values=past, use_cache=True)
        torch.testing.assert_close(logits[:, 0], full[rows, lengths + step], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_with_and_without_cache(ids: torch.Tensor, temperature: float) -> None:
    _, model = models(torch.float64)
    mask = (torch.arange(17) < LENGTHS[:, None]).long().cuda()
    cached, uncached = (
        model.generate(ids[:, :17].cuda(), 20, mask, temperature=temperature, seed=3, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


def test_compiled_generation_is_generation(ids: torch.Tensor) -> None:
    """The step is one CUDA graph: what a generation leaves in its buffers is nothing to the next."""
    _, model = models(torch.float64)
    for prompt in (ids[:, :17], ids[:, 3:9], ids[:, :17]):
        compiled, eager = (model.generate(prompt.cuda(), 20, temperature=0.0, compile=way) for way in (True, False))
        assert torch.equal(compiled, eager)
    mask = (torch.arange(17) < LENGTHS[:, None]).long().cuda()
    compiled, eager = (model.generate(ids[:, :17].cuda(), 20, mask, seed=1, compile=way) for way in (True, False))
    assert torch.equal(compiled, eager)


def test_generation_leaves_the_cuda_random_state_alone(ids: torch.Tensor) -> None:
    _, model = models(torch.float32)
    before = torch.cuda.get_rng_state()
    model.generate(ids.cuda(), 4, temperature=1.0, seed=0)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_gradients_agree_with_cpu(ids: torch.Tensor) -> None:
    cpu, gpu = models(torch.float64)
    labels = ids.masked_fill(torch.arange(24) >= LENGTHS[:, None], -100)
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        loss = next_token_loss(model(ids.to(device), seq_lengths=LENGTHS.to(device)), labels.to(device))
        loss.backward()
    for expected, seen in zip(cpu.parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(seen.grad.cpu(), expected.grad, atol=1e-10, rtol=1e-8)


def test_a_cache_on_another_device_is_refused(ids: torch.Tensor) -> None:
    cpu, gpu = models(torch.float32)
    _, past = cpu(ids, use_cache=True)
    with pytest.raises(ValueError, match="the cache of layer 0 is on cpu and input_ids on cuda:0"):
        gpu(ids[:, :1].cuda(), past_key_values=past, use_cache=True)


def test_a_model_is_loaded_to_the_gpu(tmp_path: Path) -> None:
    cpu, _ = models(torch.float32)
    save_checkpoint(tmp_path / "m.pt", cpu)
    save_pretrained(cpu, tmp_path / "m")
    for loaded in (load_checkpoint(tmp_path / "m.pt", device="cuda"), load_pretrained(tmp_path / "m", device="cuda")):
        for name, weight in loaded.state_dict().items():
            assert weight.is_cuda
            assert torch.equal(weight.cpu(), cpu.state_dict()[name])


def test_bfloat16_autocast_trains(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = DIYForCausalLM(CONFIG).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = next_token_loss(model(ids.cuda()), ids.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
