"""Self-drafters: the target's own weights draft, and the text stays what it was, bit for bit."""

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny

from foredraft import LLM, SamplingParams
from foredraft.drafters import SELF_DRAFTERS
from foredraft.drafters.self_draft import SelfDrafter, skip_set
from foredraft.engine import Engine
from foredraft.errors import ModelError, RequestError
from foredraft.models.base import SkipSet
from foredraft.models.decoder import Decoder
from foredraft.models.invariance import probe
from foredraft.models.load import wrap
from foredraft.models.rows import Span, plan
from foredraft.policy import Fixed
from foredraft.profile import HowFound, Measured, Profile, find, load, model_hash, profile_for, save
from foredraft.types import Request
from foredraft.weights.quantize import Quantizer, quant_linear

LEAN, ADAPTED = ("llama", "qwen2"), ("gpt2", "gpt_neox")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOME = SkipSet(attention=(1,))
MOST = SkipSet(attention=(0, 1), mlp=(1,))  # one MLP is left
DRAFTS = {
    "int4": ("int4", SkipSet()),
    "int8": ("int8-dynamic", SkipSet()),
    "skip": (None, SOME),
    "int4+skip": ("int4", SOME),
    "skip-most": (None, MOST),
}
PARAMS = {
    "greedy": SamplingParams(max_new_tokens=14, logprobs=5),
    "T=0.7": SamplingParams(max_new_tokens=14, logprobs=5, temperature=0.7, seed=11),
    "T=1.0": SamplingParams(max_new_tokens=14, logprobs=5, temperature=1.0, top_p=0.95, seed=12),
}


@pytest.fixture(scope="module", params=[(n, d) for n in (*LEAN, *ADAPTED) for d in DTYPES], ids="-".join)
def llm(request) -> LLM:
    """A tiny target and its plain texts; drafters come and go."""
    name, dtype = request.param
    llm = LLM(tiny(name, DTYPES[dtype]), draft="none", max_batch_size=3)
    assert llm.model.row_invariance.exact
    assert isinstance(llm.model, Decoder) == (name in LEAN)
    return llm


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Ragged ones, up to beyond a key block of 128."""
    source = random.Random(seed)
    lengths = [1, 7, 130, 3, 20, 60, 2][:count]
    return [[source.randrange(VOCAB) for _ in range(length)] for length in lengths]


def drafting(llm: LLM, name: str) -> SelfDrafter:
    weight_format, skip = DRAFTS[name]
    drafter = SelfDrafter(llm.model, name, weight_format, skip)
    llm.engine.use(drafter)
    return drafter


def outcome(results):
    return [(r.token_ids, r.logprobs, r.finish_reason) for r in results]


@cache
def texts(llm: LLM, params: str):
    """Plain decoding, once for each model."""
    return outcome(llm.generate(prompts(5), PARAMS[params], num_draft_tokens=0))


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("params", PARAMS)
def test_same_text_single_and_batched(llm, name, params):
    """Tokens and log-probabilities, five requests over three slots: two join late, and take slots used before."""
    plain = texts(llm, params)
    drafting(llm, name)
    drafted = llm.generate(prompts(5), PARAMS[params], num_draft_tokens=4)
    assert outcome(drafted) == plain
    assert sum(r.stats.drafted for r in drafted) > 0
    single = llm.generate(prompts(3)[2], PARAMS[params], num_draft_tokens=7)
    assert outcome([single]) == plain[2:3]


def test_same_text_at_every_draft_length(llm):
    plain = texts(llm, "T=0.7")[1:2]
    for gamma in range(1, 9):
        drafting(llm, ("int4", "skip")[gamma % 2])
        assert outcome([llm.generate(prompts(2)[1], PARAMS["T=0.7"], num_draft_tokens=gamma)]) == plain


def test_logits_are_the_plain_ones_bit_for_bit(llm):
    """Not rounded to log-probabilities: what the target's passes return, row for row."""
    rows: dict[bool, dict[int, torch.Tensor]] = {}
    for drafts in (False, True):
        drafting(llm, "int4+skip")
        rows[drafts] = _rows(llm, prompts(3)[1], 5 if drafts else 0)
    for position, plain in rows[False].items():
        assert torch.equal(rows[True][position], plain)


def _rows(llm: LLM, prompt: list[int], gamma: int) -> dict[int, torch.Tensor]:
    """The logits that decided each position of a greedy text."""
    engine = Engine(llm.model, llm.drafter, Fixed(gamma), max_batch_size=1, max_model_len=llm.max_model_len)
    request = Request(list(prompt), SamplingParams(max_new_tokens=16), seed=0, stop_rule=lambda token: False)
    found: dict[int, torch.Tensor] = {}
    commit = engine._commit

    def recorded(request, draft, logits):
        start = len(request.token_ids)
        output = commit(request, draft, logits)
        found.update({start + i: logits[i].clone() for i in range(len(output.token_ids))})
        return output

    engine._commit = recorded
    engine.add(request)
    while engine.has_work:
        engine.step()
    return found


def test_int8_is_accepted_almost_always(llm):
    drafting(llm, "int8")
    results = llm.generate(prompts(3), PARAMS["greedy"], num_draft_tokens=4)
    accepted, drafted = (sum(getattr(r.stats, name) for r in results) for name in ("accepted", "drafted"))
    assert accepted > 0.6 * drafted


def test_skipping_nearly_everything_is_rejected_and_harmless(llm):
    drafting(llm, "skip-most")
    results = llm.generate(prompts(3), PARAMS["greedy"], num_draft_tokens=8)
    accepted, drafted = (sum(getattr(r.stats, name) for r in results) for name in ("accepted", "drafted"))
    assert accepted < 0.5 * drafted


def test_a_variant_without_changes_is_the_target(llm):
    """The control: the same logits, over the same cache."""
    rows = plan([Span(0, 0, prompts(2)[1], 7)], 8, 512, 8)
    other = llm.model.variant()
    assert other.cache is llm.model.cache
    assert torch.equal(other.forward(rows), llm.model.forward(rows))


def test_a_skipped_sub_layer_adds_nothing(llm):
    """Zero the weights of a sub-layer's output: that is what skipping it computes."""

    def emptied(layer):
        return quant_linear(torch.zeros_like(layer.dense()), None, "int8")

    rows = plan([Span(0, 0, prompts(2)[1], 7)], 8, 512, 8)
    everything_but_one = SkipSet(attention=(0, 1), mlp=(0, 1)[1:])
    skipped = llm.model.variant(skip=everything_but_one).forward(rows)
    assert skipped.isfinite().all() and not torch.equal(skipped, llm.model.forward(rows))
    if isinstance(llm.model, Decoder):
        wanted = llm.model.variant()
        wanted.sublayers = [s if i == 1 else s.converted(emptied) for i, s in enumerate(llm.model.sublayers)]
        torch.testing.assert_close(skipped, wanted.forward(rows), rtol=0, atol=0)


def test_skipped_attention_writes_no_keys(llm):
    llm.model.cache.release()
    llm.model.variant(skip=SkipSet(attention=(1,))).forward(plan([Span(0, 0, [1, 2, 3], 1)], 4, 512))
    keys = [llm.model.cache.views(0, 1, 512)[layer][0] for layer in (0, 1)]
    assert keys[0].any() and not keys[1].any()


def test_memory(llm):
    """int4 adds at most 0.35 of a bf16 target's weights, skipping nothing; one cache serves both."""
    halves = 2 if llm.model.dtype == torch.float32 else 1
    for name, most in (("int4", 0.35), ("int4+skip", 0.35), ("int8", 0.56), ("skip", 0.0)):
        drafting(llm, name)
        llm.generate(prompts(1), PARAMS["greedy"], num_draft_tokens=3)
        memory = llm.memory
        assert memory["draft_weights"] <= most * memory["target_weights"] / halves
        assert (memory["draft_weights"] > 0) == (most > 0)
        assert memory["draft_cache"] == 0 and memory["target_cache"] == llm.model.cache.nbytes > 0
    target = memory["target_weights"]
    assert target == llm.model.weight_bytes


def test_the_target_is_left_as_it_was(llm):
    before = llm.generate(prompts(1), PARAMS["greedy"], num_draft_tokens=0)
    modules = list(llm.model.model.modules()) if not isinstance(llm.model, Decoder) else list(llm.model.sublayers)
    for name in DRAFTS:
        drafting(llm, name)
    after = list(llm.model.model.modules()) if not isinstance(llm.model, Decoder) else list(llm.model.sublayers)
    assert list(map(id, modules)) == list(map(id, after))
    assert outcome(llm.generate(prompts(1), PARAMS["greedy"], num_draft_tokens=0)) == outcome(before)


@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_target_verifies_drafts_of_itself(weight_format, dtype):
    """Weight-only kernels are row invariant; an int4 draft of an int4 target shares its very layers."""
    llm = LLM(tiny("llama", DTYPES[dtype]), draft="none")
    target = llm.model.variant(Quantizer(weight_format))
    target.row_invariance = llm.model.row_invariance
    target.row_invariance = probe(target)
    assert target.row_invariance.exact
    llm.model = llm.engine.target = target
    plain = llm.generate(prompts(3), PARAMS["T=0.7"], num_draft_tokens=0)
    for name in ("int4", "skip", "int4+skip"):
        drafter = drafting(llm, name)
        drafted = llm.generate(prompts(3), PARAMS["T=0.7"], num_draft_tokens=4)
        assert outcome(drafted) == outcome(plain)
        assert (drafter.weight_bytes == 0) == (name == "skip" or weight_format == "int4")
        if name == weight_format:
            assert all(r.stats.draft_acceptance_rate > 0.9 for r in drafted)


def test_every_self_drafter_by_name(own_cache):
    model = wrap(tiny("llama"))
    save(profile_for(model, SOME, {}, HowFound()))
    plain = LLM(tiny("llama"), draft="none").generate(prompts(3), PARAMS["greedy"])
    for name in SELF_DRAFTERS:
        llm = LLM(tiny("llama"), draft=name)
        assert llm.drafter.name == name
        assert outcome(llm.generate(prompts(3), PARAMS["greedy"])) == outcome(plain)


def test_profile_by_path_and_by_hash(tmp_path):
    model = tiny("llama")
    with pytest.raises(ModelError, match=r"no skip profile is known .* run foredraft tune"):
        LLM(model, draft="skip")
    figures = {"skip": Measured(alpha=0.8, cost_ratio=0.5, num_draft_tokens=4, speedup=1.3)}
    profile = profile_for(wrap(tiny("llama")), SOME, figures, HowFound("tpe", 100, 3, "its own text"))
    path = save(profile, tmp_path / "elsewhere" / "mine.json")
    assert load(path) == profile
    assert LLM(tiny("llama"), draft="skip", draft_profile=path).drafter.skip == SOME
    assert save(profile).name == f"{profile.model_hash}.json"
    assert LLM(tiny("llama"), draft="int4+skip").drafter.skip == SOME
    assert not list(tmp_path.rglob("*.partial"))


def test_hash_tells_models_apart_but_not_dtypes():
    hashes = {name: model_hash(wrap(tiny(name))) for name in (*LEAN, *ADAPTED)}
    assert len(set(hashes.values())) == len(hashes)
    assert model_hash(wrap(tiny("llama", seed=1))) != hashes["llama"]
    for name in ("llama", "gpt2"):
        assert model_hash(wrap(tiny(name).to(torch.bfloat16))) == hashes[name]


def test_profile_of_another_model_is_refused_unless_forced(tmp_path):
    other = profile_for(wrap(tiny("llama", seed=1)), SOME, {}, HowFound())
    path = save(other, tmp_path / "other.json")
    with pytest.raises(ModelError, match=rf"found for another model \(llama, 2 layers, hash {other.model_hash}\)"):
        LLM(tiny("llama"), draft="skip", draft_profile=path)
    assert LLM(tiny("llama"), draft="skip", draft_profile=path, force_profile=True).drafter.skip == SOME
    path = save(replace(other, skip=SkipSet(attention=(7,)), num_layers=8), tmp_path / "deeper.json")
    with pytest.raises(ModelError, match="names layer 7, and the model has layers 0 to 1"):
        LLM(tiny("llama"), draft="skip", draft_profile=path, force_profile=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sets_that_do_not_fit_are_refused(name):
    model = wrap(tiny(name))
    for skip, words in (
        (SkipSet(mlp=(2,)), "names layer 2, and the model has layers 0 to 1"),
        (SkipSet(attention=(-1,)), "names layer -1"),
        (SkipSet((0, 1), (0, 1)), "skips all 4 sub-layers; leave at least one in"),
    ):
        with pytest.raises(ModelError, match=words):
            SelfDrafter(model, "skip", skip=skip)


def test_a_model_whose_layers_have_no_mlp_module_is_refused_by_name():
    with pytest.raises(ModelError, match=r"layers of 'opt' cannot be skipped: .* use draft='int4'"):
        SelfDrafter(wrap(tiny("opt")), "skip", skip=SOME)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no skip profile at .*No such file"),
        ("{", "is no skip profile: it is not JSON"),
        ("[]", "profile format None, and 1 is known here"),
        ('{"format": 9}', "profile format 9, and 1 is known here"),
        ('{"format": 1}', "is no skip profile .KeyError"),
        (
            json.dumps({"format": 1, "model_type": "llama", "model_hash": "0", "num_layers": 2}
                       | {"skip": {"attention": ["1"], "mlp": []}}),
            "layers must be a list of numbers",
        ),
    ],
)  # fmt: skip
def test_damaged_profiles_are_refused(tmp_path, content, words):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ModelError, match=words):
        skip_set(wrap(tiny("llama")), path)


def test_options_that_cannot_be_honoured_are_refused(tmp_path):
    with pytest.raises(ModelError, match="draft='int4' takes no profile"):
        LLM(tiny("llama"), draft="int4", draft_profile=tmp_path / "x.json")
    with pytest.raises(RequestError, match="draft_dtype='bfloat16'"):
        LLM(tiny("llama"), draft="int4", draft_dtype="bfloat16")


def test_a_failed_save_leaves_the_old_profile(tmp_path, monkeypatch):
    profile = profile_for(wrap(tiny("llama")), SOME, {}, HowFound())
    path = save(profile, tmp_path / "p.json")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(replace(profile, skip=MOST), path)
    assert load(path) == profile and [p.name for p in tmp_path.glob("p*")] == ["p.json"]


def test_profiles_are_found_in_the_platforms_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FOREDRAFT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    model = wrap(tiny("llama"))
    assert find(model) is None
    profile: Profile = profile_for(model, SOME, {}, HowFound())
    assert save(profile).parent == tmp_path / "xdg" / "foredraft" / "profiles"
    assert find(model) == profile


@pytest.mark.parametrize("folder", ["stories260K", "stories3M"])
def test_trained_models(shared, folder):
    path = shared / "models" / folder
    if not path.is_dir():
        pytest.skip(f"needs {path.name} in shared/models, which is not there")
    prompt = "Once upon a time, there was a little"
    for dtype in ("float32", "bfloat16"):
        llm = LLM(path, draft="none", dtype=dtype)
        for params in (PARAMS["greedy"], PARAMS["T=0.7"]):
            plain = llm.generate([prompt, "The dog"], params, num_draft_tokens=0)
            for name in ("int4", "int8", "skip"):
                drafting(llm, name)
                drafted = llm.generate([prompt, "The dog"], params, num_draft_tokens=5)
                assert outcome(drafted) == outcome(plain)
                if name == "int8":
                    assert sum(r.stats.accepted for r in drafted) > 0.7 * sum(r.stats.drafted for r in drafted)


@pytest.mark.parametrize("name", ["skip", "int4+skip"])
def test_the_bundled_target_ships_with_a_profile(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FOREDRAFT_CACHE", str(tmp_path))
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    drafted = LLM(draft=name).generate("User: Find me a hotel in Paris.\nAssistant:", params, num_draft_tokens=3)
    plain = LLM(draft="none").generate("User: Find me a hotel in Paris.\nAssistant:", params)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.accepted > 0
