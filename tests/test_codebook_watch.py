"""Codes that nobody chooses are found, replaced and forgotten by all that remembers them; and what does not revive."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import VQ, assert_equal, checkpoint, free_port, logged, run, tiny_config
from torch import Tensor, nn

from trellis.evaluation.metrics import codebook_counts
from trellis.models.vqvae import VqVae
from trellis.modules.quantizers.base import Quantized, Quantizer
from trellis.modules.quantizers.ema_vq import EMAVectorQuantizer
from trellis.modules.quantizers.product_vq import ProductVectorQuantizer
from trellis.modules.quantizers.residual_vq import ResidualVectorQuantizer
from trellis.modules.quantizers.vq import VectorQuantizer
from trellis.trainers.basic import BasicTrainer
from trellis.trainers.ema import EMA
from trellis.trainers.vae import codebook_watch
from trellis.trainers.vae.codebook_watch import CodebookWatch
from trellis.trainers.vae.sparse_structure_vqvae import SparseStructureVqVaeTrainer
from trellis.utils.random_utils import derive_seed, sample_noise

pytestmark = pytest.mark.usefixtures("without_pictures")
K, CELLS = 16, (2, 2, 4)


@pytest.fixture
def short_windows(monkeypatch):
    """Let a window end when it has seen a vector for each code."""
    monkeypatch.setattr(codebook_watch, "VECTORS_PER_CODE", 1)


def memory_of(quantizer: Quantizer) -> SimpleNamespace:
    """What a trainer has beside a quantizer: Adam's moments and averages, none of them zero."""
    parameters = list(quantizer.parameters()) or [nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, amsgrad=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ema = EMA({"quantizer": quantizer}, [0.9, 0.99])
    for average in ema.averages.values():
        for value in average["quantizer"].values():
            value += 1
    return SimpleNamespace(models={"quantizer": quantizer}, optimizer=optimizer, ema=ema)


def make_watch(quantizer: Quantizer, said: list | None = None, memory=None, **options) -> CodebookWatch:
    memory = memory or memory_of(quantizer)

    def forget(keys: tuple[str, ...], rows: Tensor) -> None:
        BasicTrainer.forget_rows(memory, "quantizer", keys, rows)

    options = {"every": 2, "last_step": 8, "trained": True, "seed": 3, **options}
    say = (said if said is not None else []).append
    return CodebookWatch(quantizer, forget=forget, say=say, device=torch.device("cpu"), **options)


def see(watch: CodebookWatch, step: int, z: Tensor, ids: Tensor, ss: Tensor | None = None) -> None:
    with torch.no_grad():
        quantized = watch.quantizer(z)
    quantizer = watch.quantizer
    counts = codebook_counts(quantized.indices, quantizer.n_embed, quantizer.codes_per_token)
    watch.observe(step, counts.view(quantizer.codes_per_token, -1), z, quantized, ss, ids)


def crowded(kind: type[Quantizer] = VectorQuantizer, chosen: int = 3) -> Quantizer:
    """Codes from `chosen` on are far from every latent."""
    quantizer = kind(n_embed=K, embed_dim=4, latent_channels=4).train(False)
    codes = torch.randn(K, 4, generator=torch.Generator().manual_seed(0))
    codes[chosen:] += 1000
    quantizer.fill(codes)
    return quantizer


def latents(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 4, *CELLS, generator=torch.Generator().manual_seed(seed))


# --- what is replaced, and by what ---


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("kind", [VectorQuantizer, EMAVectorQuantizer])
def test_dead_rows_are_new_everywhere_and_others_as_they_were(kind):
    quantizer, said = crowded(kind), []
    memory = memory_of(quantizer)
    watch = make_watch(quantizer, said, memory)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    moments = {key: value.clone() for state in memory.optimizer.state.values() for key, value in state.items()}
    averages = {rate: {k: v.clone() for k, v in a["quantizer"].items()} for rate, a in memory.ema.averages.items()}
    z = latents(3)
    see(watch, 1, z, torch.arange(3))
    assert watch.after_step(1)["codes_revived"] == 0
    see(watch, 2, latents(3, seed=1), torch.arange(3, 6))
    chosen = (watch.counts[0] > 0).nonzero()[:, 0]
    dead = (watch.counts[0] == 0).nonzero()[:, 0]
    assert 0 < len(chosen) <= 3
    status = watch.after_step(2)
    assert status["codes_revived"] == len(dead) and status["codebook_window_usage"] == len(chosen) / K
    assert any(f"{len(dead)} of {K} codes" in line for line in said)
    after = quantizer.state_dict()
    seen = torch.cat([quantizer.to_vectors(z), quantizer.to_vectors(latents(3, seed=1))]).flatten(0, -2)
    new = after["embeddings.weight"][dead]
    assert (torch.cdist(new, seen).amin(1) == 0).all() and len(new.unique(dim=0)) == len(dead)
    for key in quantizer.code_rows:
        assert torch.equal(after[key][chosen], before[key][chosen]), key
        for rate, average in memory.ema.averages.items():
            assert torch.equal(average["quantizer"][key][dead], after[key][dead]), key
            assert torch.equal(average["quantizer"][key][chosen], averages[rate][key][chosen]), key
    if kind is VectorQuantizer:
        (state,) = memory.optimizer.state.values()
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert (state[key][dead] == 0).all() and torch.equal(state[key][chosen], moments[key][chosen])
            assert (state[key][chosen] != 0).all()
        assert state["step"] == moments["step"]
    else:
        assert (after["counts"][dead] == 1).all() and torch.equal(after["sums"][dead], new)


def keys_of(quantizer: Quantizer, z: Tensor, ids: Tensor, seed: int) -> Tensor:
    """By the definition: x / squared error, x = -log u, u = Phi(normal)."""
    vectors = quantizer.to_vectors(z).flatten(1, 3).double()
    error = (vectors[:, :, None] - quantizer.table().double()).square().sum(-1).amin(-1)
    normal = sample_noise(ids, error.shape[1:], derive_seed("revival", seed), torch.device("cpu")).double()
    return -torch.log(0.5 * torch.special.erfc(-normal / 2**0.5)) / error


def test_the_sample_is_that_of_the_smallest_keys_however_batches_are_cut():
    quantizer, z, ids = crowded(), latents(9), torch.arange(40, 49)
    order = keys_of(quantizer, z, ids, seed=3).flatten().argsort()[:K]
    want = quantizer.to_vectors(z).flatten(0, 3)[order]
    for cuts in ([9], [4, 5], [1, 6, 2]):
        watch = make_watch(quantizer)
        for part, part_ids in zip(z.split(cuts), ids.split(cuts), strict=True):
            see(watch, 1, part, part_ids)
            state = watch.state_dict()  # a checkpoint in between, which another process continues
            watch = make_watch(quantizer)
            watch.load_state_dict(state)
        assert torch.equal(watch.state_dict()["vectors"], want)
        assert watch.counts.sum() == 9 * 16


def test_vectors_are_drawn_in_proportion_to_their_error():
    quantizer = VectorQuantizer(n_embed=2, embed_dim=1, latent_channels=1)
    quantizer.fill(torch.tensor([[0.0], [100.0]]))
    z = torch.tensor([1.0, 2.0, 3.0, 0.0]).view(1, 1, 1, 1, 4)
    watch, drawn = make_watch(quantizer, seed=0), torch.zeros(4)
    for sample in range(3000):
        watch.samples[0].empty()
        quantized = Quantized(torch.zeros_like(z), torch.zeros(1, 1, 1, 4, dtype=torch.int64), {})
        watch.observe(1, torch.zeros(1, 2, dtype=torch.int64), z, quantized, None, torch.tensor([sample]))
        drawn[int(watch.samples[0].vectors[0])] += 1
    share = drawn / 3000
    assert share[0] == 0
    for value in (1, 2, 3):
        p = value**2 / 14
        assert abs(share[value] - p) < 4 * (p * (1 - p) / 3000) ** 0.5


@pytest.mark.usefixtures("short_windows")
def test_only_tokens_with_occupied_voxels_are_drawn():
    quantizer = crowded()
    watch, z = make_watch(quantizer), latents(2)
    ss = torch.zeros(2, 1, 4, 4, 8, dtype=torch.uint8)
    ss[0, 0, 0, 3, 7] = ss[1, 0, 2, 0, 0] = 1
    see(watch, 1, z, torch.arange(2), ss)
    tokens = quantizer.to_vectors(z)
    got = {tuple(row) for row in watch.state_dict()["vectors"].tolist()}
    assert got == {tuple(tokens[0, 0, 1, 3].tolist()), tuple(tokens[1, 1, 0, 0].tolist())}
    assert watch.after_step(2)["codes_revived"] == 2  # no more than there are vectors


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_overflow_leaves_nothing(value):
    quantizer = crowded()
    watch, z = make_watch(quantizer), latents(3)
    z[1, 2] = value
    see(watch, 1, z, torch.arange(3))
    keys = keys_of(quantizer, z[[0, 2]], torch.tensor([0, 2]), seed=3)
    order = keys.flatten().argsort()[:K]
    assert torch.equal(watch.state_dict()["vectors"], quantizer.to_vectors(z[[0, 2]]).flatten(0, 3)[order])


def test_equal_vectors_do_not_become_two_codes():
    quantizer = crowded()
    watch = make_watch(quantizer)
    z = latents(1).expand(5, -1, -1, -1, -1).contiguous()
    see(watch, 2, z, torch.arange(5))
    watch.after_step(2)
    codes = quantizer.embeddings.weight.detach()
    assert len(codes.unique(dim=0)) == K


@pytest.mark.usefixtures("short_windows")
def test_nothing_is_revived_after_the_last_step_or_when_not_trained():
    for options in ({"last_step": 1.9}, {"trained": False}, {"every": 0}):
        quantizer, said = crowded(), []
        watch = make_watch(quantizer, said, **options)
        before = quantizer.embeddings.weight.clone()
        step = watch.window
        see(watch, step, latents(2), torch.arange(2))
        assert watch.after_step(step).get("codes_revived", 0) == 0
        assert torch.equal(quantizer.embeddings.weight, before)
        assert not any(sample.keys.isfinite().any() for sample in watch.samples)
        (line,) = said
        assert line.startswith("WARNING: the codebook collapses. Only 19% of 16 codes were chosen")
        assert ("revive_every" in line) == ("trained" not in options)
        watch.after_step(2 * step)
        assert len(said) == 1


def test_a_codebook_in_use_is_left_alone():
    quantizer, said = crowded(chosen=K), []
    watch = make_watch(quantizer, said)
    before = quantizer.embeddings.weight.clone()
    see(watch, 2, quantizer.ungroup_cells(before.detach().view(1, *CELLS, 4)), torch.arange(1))
    status = watch.after_step(2)
    assert status["codebook_window_usage"] == 1 and status["codes_revived"] == 0 and not said
    assert torch.equal(quantizer.embeddings.weight, before)


@pytest.mark.parametrize("lost", [[], [1, 2, 4]])
def test_a_window_goes_on_until_it_has_seen_enough(lost):
    """160 vectors tell about 16 codes. Here come 32 in a step, for windows of two steps, or fewer steps do."""
    quantizer, said = crowded(), []
    watch = make_watch(quantizer, said, last_step=100)
    revived, usage = {}, {}
    for step in range(1, 15):
        if step not in lost:
            see(watch, step, latents(2, seed=step), torch.arange(2 * step, 2 * step + 2))
            state = watch.state_dict()  # a checkpoint in between, which another process continues
            watch = make_watch(quantizer, said, last_step=100)
            watch.load_state_dict(state)
        status = watch.after_step(step)
        revived[step], usage[step] = int(status["codes_revived"]), float(status["codebook_window_usage"])
    end = 6 if not lost else 8  # 5 and 8 steps, up to an even one
    assert [step for step, count in revived.items() if count] == [end] and revived[end] == 13
    assert usage[end - 1] == usage[end] == usage[end + 1] == 3 / 16
    assert [line.startswith("WARNING") for line in said] == [True, False]
    assert f"by the last {32 * (end - len(lost))} tokens" in said[0]


def test_tokens_with_the_empty_code_are_neither_counted_nor_drawn():
    """Whatever their latents are, and without grids too."""
    quantizer = VectorQuantizer(n_embed=K + 1, embed_dim=4, latent_channels=4, empty_code=True)
    quantizer.fill(crowded().embeddings.weight.detach())
    occupied = torch.rand(5, *CELLS, generator=torch.Generator().manual_seed(1)) < 0.3
    z = latents(5).masked_fill(~occupied[:, None], 7.0)
    quantized = quantizer(z, occupied)
    counts = codebook_counts(quantized.indices, K + 1)[1:]
    watch = make_watch(quantizer)
    watch.observe(1, counts[None], z, quantized, None, torch.arange(5))
    keys = torch.where(occupied.flatten(), keys_of(quantizer, z, torch.arange(5), seed=3).flatten(), torch.inf)
    assert occupied.sum() > K and watch.counts.shape == (1, K) and watch.counts.sum() == occupied.sum()
    assert torch.equal(watch.state_dict()["vectors"], quantizer.to_vectors(z).flatten(0, 3)[keys.argsort()[:K]])


# --- several codebooks ---

SEVERAL = [(kind, decay) for kind in (ResidualVectorQuantizer, ProductVectorQuantizer) for decay in (None, 0.9)]


def several(kind: type[Quantizer], decay: float | None = None, empty_code: bool = False) -> Quantizer:
    """Two codebooks with codes 0 to 2 near vectors and all others far away."""
    shape = {"n_embed": K + empty_code, "embed_dim": 4, "latent_channels": 4, "empty_code": empty_code}
    quantizer = kind(**shape, num_codes=2, decay=decay).train(False)
    for place in range(2):
        codes = torch.randn(K, quantizer.code_channels(), generator=torch.Generator().manual_seed(place))
        codes[3:] += 1000
        quantizer.fill_codebook(place, codes)
    return quantizer


def what_each_quantizes(quantizer: Quantizer, z: Tensor) -> list[Tensor]:
    """By the definition, [N, d] for each of two codebooks."""
    vectors = quantizer.to_vectors(z).flatten(0, -2)
    if isinstance(quantizer, ProductVectorQuantizer):
        return list(vectors.chunk(2, 1))
    first = quantizer.tables()[0].detach()
    return [vectors, vectors - first[torch.cdist(vectors, first).argmin(1)]]


def is_one_of(rows: Tensor, known: Tensor) -> bool:
    return bool((rows[:, None] == known).all(-1).any(1).all())


@pytest.mark.parametrize("kind, decay", SEVERAL)
def test_dead_codes_of_each_codebook_move_to_what_it_quantizes(kind, decay):
    quantizer, said = several(kind, decay), []
    memory = memory_of(quantizer)
    watch = make_watch(quantizer, said, memory, every=1)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    averages = {rate: {k: v.clone() for k, v in a["quantizer"].items()} for rate, a in memory.ema.averages.items()}
    z = latents(12)
    targets = what_each_quantizes(quantizer, z)
    see(watch, 1, z, torch.arange(12))
    counts = watch.counts.clone()
    status = watch.after_step(1)
    assert status["codes_revived"] == (counts == 0).sum() and status["codebook_window_usage"] == (counts > 0).sum() / 32
    after = quantizer.state_dict()
    assert set(quantizer.code_rows) == set(after)
    for place in range(2):
        chosen, dead = (counts[place] > 0).nonzero()[:, 0], (counts[place] == 0).nonzero()[:, 0]
        assert 0 < len(chosen) <= 3
        assert any(f"{len(dead)} of {K} codes in place {place + 1} of a token" in line for line in said)
        new = after[f"embeddings.{place}.weight"][dead]
        assert is_one_of(new, targets[place]) and len(new.unique(dim=0)) == len(dead)
        for key in (key for key in after if f".{place}." in key):
            assert torch.equal(after[key][chosen], before[key][chosen]), key
            for rate, average in memory.ema.averages.items():
                assert torch.equal(average["quantizer"][key][dead], after[key][dead]), key
                assert torch.equal(average["quantizer"][key][chosen], averages[rate][key][chosen]), key
        if decay is None:
            state = memory.optimizer.state[list(quantizer.parameters())[place]]
            for moment in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                assert (state[moment][dead] == 0).all() and (state[moment][chosen] != 0).all()
        else:
            assert (after[f"embeddings.{place}.counts"][dead] == 1).all()
            assert torch.equal(after[f"embeddings.{place}.sums"][dead], new)


@pytest.mark.parametrize("empty_code", [False, True])
@pytest.mark.parametrize("kind", [ResidualVectorQuantizer, ProductVectorQuantizer])
def test_samples_of_several_codebooks_are_those_of_the_smallest_keys_however_batches_are_cut(kind, empty_code):
    quantizer, z, ids = several(kind, 0.9, empty_code), latents(9), torch.arange(40, 49)
    occupied = torch.rand(9, *CELLS, generator=torch.Generator().manual_seed(1)) < 0.5
    targets = what_each_quantizes(quantizer, z)
    noise = sample_noise(ids, (2, 16), derive_seed("revival", 3), torch.device("cpu")).double()
    for cuts in ([9], [4, 5], [1, 6, 2]):
        watch = make_watch(quantizer)
        for part, own, part_ids in zip(z.split(cuts), occupied.split(cuts), ids.split(cuts), strict=True):
            with torch.no_grad():
                quantized = quantizer(part, own)
            counts = codebook_counts(quantized.indices, K + empty_code, 2)[:, int(empty_code) :]
            watch.observe(1, counts, part, quantized, None, part_ids)
            state = watch.state_dict()  # a checkpoint in between, which another process continues
            watch = make_watch(quantizer)
            watch.load_state_dict(state)
        assert watch.counts.sum(1).tolist() == [occupied.sum() if empty_code else 9 * 16] * 2
        for place, (target, table) in enumerate(zip(targets, quantizer.tables(), strict=True)):
            error = torch.cdist(target.double(), table.double()).amin(1).square()
            keys = -torch.log(0.5 * torch.special.erfc(-noise[:, place].flatten() / 2**0.5)) / error
            if empty_code:
                keys[~occupied.flatten()] = torch.inf
            got = watch.state_dict()["vectors" if place == 0 else "vectors.1"]
            assert torch.equal(got, target[keys.argsort()[:K]])


# --- runs ---


@pytest.fixture
def collapsed(tmp_path) -> str:
    """A quantizer's weights: one code at the origin, all others far away."""
    codes = torch.full((32, 4), 100.0) + torch.arange(32.0)[:, None]
    codes[0] = 0
    torch.save({"embeddings.weight": codes}, tmp_path / "collapsed.pt")
    torch.save({"embeddings.weight": codes, "sums": codes, "counts": torch.ones(32)}, tmp_path / "collapsed_ema.pt")
    torch.save({f"embeddings.{place}.weight": codes for place in range(2)}, tmp_path / "collapsed_residual.pt")
    return str(tmp_path / "collapsed.pt")


def stage1(quantizer: str = "VectorQuantizer", **args) -> dict:
    defaults = {
        "freeze": ["encoder", "decoder"],
        "loss_type": "l1",
        "max_steps": 12,
        "i_eval": 100,
        "i_save": 3,
        "revive_every": 4,
    }
    config = tiny_config(VQ, **{**defaults, **args})
    config["models"]["quantizer"]["name"] = quantizer
    return config


def start_of(quantizer: str, collapsed: str) -> dict:
    """The configuration of a run from collapsed codes. Residual codes follow averages."""
    suffix = {"VectorQuantizer": "", "EMAVectorQuantizer": "_ema", "ResidualVectorQuantizer": "_residual"}[quantizer]
    config = stage1(quantizer, finetune_ckpt={"quantizer": collapsed.replace(".pt", f"{suffix}.pt")})
    if quantizer == "ResidualVectorQuantizer":
        config["models"]["quantizer"]["args"]["decay"] = 0.9
    return config


def test_a_collapsed_codebook_comes_back_to_life(vae_run, collapsed, data_dir, write_config, tmp_path, capsys):
    config = write_config(stage1(finetune_ckpt={"quantizer": collapsed}))
    assert run("--config", config, "--data_dir", data_dir, "--load_dir", vae_run, "--output_dir", tmp_path / "run") == 0
    lines = {line["step"]: line for line in logged(tmp_path / "run") if "loss" in line}
    assert lines[4]["codes_revived"] == 31 and lines[4]["codebook_window_usage"] == 1 / 32
    assert [step for step in lines if lines[step]["codes_revived"]] in ([4], [4, 8])  # none after 0.8 * 12 steps
    assert lines[12]["codebook_window_usage"] > 0.9
    assert lines[5]["vq"] < 0.1 * lines[4]["vq"]
    assert capsys.readouterr().out.count("WARNING: the codebook collapses. Only 3% of 32 codes were chosen") == 1


@pytest.mark.parametrize("quantizer", ["VectorQuantizer", "EMAVectorQuantizer", "ResidualVectorQuantizer"])
def test_a_run_cut_off_within_a_window_continues_exactly(
    quantizer, vae_run, collapsed, data_dir, write_config, tmp_path, monkeypatch
):
    config = write_config(start_of(quantizer, collapsed))
    flags = ("--config", config, "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "whole") == 0
    run_step = SparseStructureVqVaeTrainer.run_step

    def cut_off(self, batch):
        if self.step == 7:  # after the checkpoint of step 6, in the second window
            raise RuntimeError("cut off")
        return run_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SparseStructureVqVaeTrainer, "run_step", cut_off)
        assert run(*flags, "--output_dir", tmp_path / "parts") == 1
    assert run(*flags, "--output_dir", tmp_path / "parts") == 0
    for step in (6, 9, 12):
        assert_equal(checkpoint(tmp_path / "whole", step), checkpoint(tmp_path / "parts", step))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    assert sum(line.get("codes_revived", 0) for line in logged(tmp_path / "whole")) >= 31
    assert len(checkpoint(tmp_path / "whole", 6)["misc_step0000006.pt"]["codebook_watch"]["keys"])


@pytest.mark.parametrize("quantizer, loss_type", [("VectorQuantizer", "l1"), ("ResidualVectorQuantizer", "none")])
def test_two_ranks_equal_one(quantizer, loss_type, vae_run, collapsed, data_dir, write_config, tmp_path):
    """The moving averages have no parameters: nothing for an optimizer, nothing to reduce."""
    config = start_of(quantizer, collapsed)
    config["trainer"]["args"].update(loss_type=loss_type, i_ddpcheck=1, max_steps=9)
    flags = (
        "--config",
        write_config(config),
        "--data_dir",
        data_dir,
        "--load_dir",
        vae_run,
        "--master_port",
        free_port(),
        "--set",
        "trainer.args.revive_until=1.0",
    )
    assert run(*flags, "--output_dir", tmp_path / "one") == 0
    assert run(*flags, "--output_dir", tmp_path / "two", "--num_gpus", 2) == 0
    one, two = ([line for line in logged(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=2e-5), (a["step"], name)
    assert one[3]["codes_revived"] == two[3]["codes_revived"] == (62 if quantizer == "ResidualVectorQuantizer" else 31)
    codes = [checkpoint(tmp_path / name, 9)["quantizer_step0000009.pt"] for name in ("one", "two")]
    torch.testing.assert_close(*codes, atol=1e-4, rtol=0)


def test_a_checkpoint_from_before_there_was_a_watch_continues(vae_run, data_dir, write_config, tmp_path):
    flags = (
        "--config",
        write_config(stage1()),
        "--data_dir",
        data_dir,
        "--output_dir",
        tmp_path / "run",
        "--load_dir",
        vae_run,
    )
    assert run(*flags, "--set", "trainer.args.max_steps=3") == 0
    path = tmp_path / "run" / "ckpts" / "misc_step0000003.pt"
    misc = torch.load(path, weights_only=True)
    del misc["codebook_watch"], misc["sums"]
    torch.save(misc, path)
    assert run(*flags) == 0
    assert checkpoint(tmp_path / "run", 12)


def test_a_decoder_alone_leaves_ids_as_they_are(vae_run, data_dir, write_config, tmp_path):
    config = write_config(stage1(max_steps=2))
    flags = ("--data_dir", data_dir)
    assert run("--config", config, *flags, "--load_dir", vae_run, "--output_dir", tmp_path / "stage1") == 0
    config = write_config(stage1(freeze=["encoder", "quantizer"], latent_cache=True, lr_multipliers={"decoder": 0.5}))
    assert run("--config", config, *flags, "--load_dir", tmp_path / "stage1", "--output_dir", tmp_path / "run") == 0
    first, last = checkpoint(tmp_path / "run", 0), checkpoint(tmp_path / "run", 12)
    for name in ("encoder", "quantizer"):
        assert_equal(first[f"{name}_step0000000.pt"], last[f"{name}_step0000012.pt"])
    assert_equal(
        checkpoint(tmp_path / "stage1", 2)["quantizer_ema0.9999_step0000002.pt"], last["quantizer_step0000012.pt"]
    )
    assert not torch.equal(
        *(files[f"decoder_step00000{step}.pt"]["input_layer.weight"] for files, step in ((first, "00"), (last, "12")))
    )
    lines = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert len(lines) == 12 and all(line["loss"] == line["l1"] for line in lines)
    assert lines[0].keys() & {"vq", "commit", "codes_revived", "codebook_window_usage"} == set()
    assert len({line["codebook_usage"] for line in lines[::6]}) == 1  # the same objects, epoch after epoch


def test_an_encoder_is_held_to_a_frozen_codebook_by_the_commitment_alone(vae_run, data_dir, write_config, tmp_path):
    config = write_config(stage1(max_steps=2))
    flags = ("--data_dir", data_dir)
    assert run("--config", config, *flags, "--load_dir", vae_run, "--output_dir", tmp_path / "stage1") == 0
    config = write_config(stage1(freeze=["quantizer"], max_steps=4))
    assert run("--config", config, *flags, "--load_dir", tmp_path / "stage1", "--output_dir", tmp_path / "run") == 0
    lines = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert "vq" not in lines[0] and "codes_revived" not in lines[0] and "codebook_window_usage" in lines[0]
    for line in lines:
        assert line["loss"] == pytest.approx(line["l1"] + 0.25 * line["commit"], rel=1e-6)


def test_moving_averages_train_without_any_parameter(vae_run, data_dir, write_config, tmp_path):
    scheduler = {"name": "ExponentialLR", "args": {"gamma": 0.5}}
    config = stage1("EMAVectorQuantizer", loss_type="none", lr_scheduler=scheduler)
    config["models"]["quantizer"]["args"].update(init="uniform", decay=0.5)
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    lines = [line for line in logged(tmp_path / "run") if "loss" in line]
    assert lines[-1]["commit"] < 0.5 * lines[0]["commit"] and lines[-1]["grad_norm"] == 0
    assert lines[-1]["loss"] == pytest.approx(0.25 * lines[-1]["commit"])


def test_several_codes_a_token_are_counted_by_place(vae_run, data_dir, write_config, tmp_path):
    config = stage1("ResidualVectorQuantizer", max_steps=4)
    flags = ("--config", write_config(config), "--data_dir", data_dir, "--load_dir", vae_run)
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    line = [line for line in logged(tmp_path / "run") if "loss" in line][-1]
    assert 0 < line["codebook_usage"] <= line["codebook_window_usage"] <= 1 and "codes_revived" in line
    assert 1 <= line["codebook_perplexity"] <= 32
    misc = checkpoint(tmp_path / "run", 3)["misc_step0000003.pt"]
    counts = misc["codebook_watch"]["counts"]
    assert counts.shape == (2, 32) and counts.sum(1).tolist() == [3 * 4 * 64] * 2
    assert misc["codebook_watch"].keys() == {"counts", "usage", "keys", "vectors", "keys.1", "vectors.1"}


def test_the_entropy_loss_has_its_weight(vae_run, data_dir, write_config, tmp_path, capsys):
    flags = ("--data_dir", data_dir, "--load_dir", vae_run)
    config = write_config(stage1("IndexBackpropagationQuantizer", max_steps=2, lambda_entropy=0.5))
    assert run("--config", config, *flags, "--output_dir", tmp_path / "run") == 0
    for line in logged(tmp_path / "run"):
        if "loss" in line:
            terms = (line["l1"], line["vq"], 0.25 * line["commit"], 0.5 * line["entropy"])
            assert line["loss"] == pytest.approx(sum(terms), rel=1e-5) and line["entropy"]
    config = write_config(stage1(lambda_entropy=0.5))
    assert run("--config", config, *flags, "--output_dir", tmp_path / "none", "--tryrun") == 1
    assert "lambda_entropy is 0.5, but VectorQuantizer has no entropy loss" in capsys.readouterr().err


def test_usage_of_several_codes_is_the_mean_over_places(monkeypatch):
    """Against numpy: codes of different places with the same number are different codes."""
    trainer = SparseStructureVqVaeTrainer.__new__(SparseStructureVqVaeTrainer)
    ids = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 1]]).view(1, 2, 2, 1, 2)

    class Stub:
        n_embed, codes_per_token, empty_code, first_code = 4, 2, False, 0

        def __call__(self, z, occupied):
            from trellis.modules.quantizers.base import Quantized

            return Quantized(z, ids, {"vq": torch.zeros(()), "commit": torch.zeros(())})

    trainer.quantizer, trainer.quantizer_losses, trainer.watch, trainer.loss_type = Stub(), (), None, "none"
    trainer.vqvae = VqVae(None, trainer.quantizer, None)
    _, status = trainer.training_losses(sample_ids=torch.zeros(1), z=torch.zeros(1))
    assert status.codebook_usage == (2 / 4 + 3 / 4) / 2
    entropies = [-sum(p * np.log(p) for p in shares) for shares in ((3 / 4, 1 / 4), (1 / 2, 1 / 4, 1 / 4))]
    assert status.codebook_perplexity.item() == pytest.approx(np.exp(np.mean(entropies)), rel=1e-6)


def test_a_group_that_does_not_fit_the_latent_is_named_before_anything_is_made(
    vae_run, data_dir, write_config, tmp_path, capsys
):
    config = stage1(embed_dim=12)
    config["models"]["quantizer"]["args"]["group"] = [3, 1, 1]
    flags = ("--data_dir", data_dir, "--load_dir", vae_run, "--output_dir", tmp_path / "run")
    assert run("--config", write_config(config), *flags) == 1
    assert "models.quantizer.args: a code of embed_dim 12 covers 3 cells along x" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
