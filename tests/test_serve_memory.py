"""What a served model may take: its caches get a batch of the longest texts, and no more than the budget leaves."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from foredraft.cli.serve import ServeOptions, read_launches, read_settings
from foredraft.errors import RequestError
from foredraft.server.errors import ApiError
from foredraft.server.launching import LaunchSpec, footprint, load, taken
from foredraft.server.models import Loader, Models
from foredraft.server.settings import Limits

SPEC = LaunchSpec("bundled", max_model_len=256, max_batch_size=2, draft="ngram")


def longest(llm: Any, texts: int) -> int:
    return sum(cache.need([llm.max_model_len] * texts) for cache in llm.engine.caches())


def test_caches_get_what_a_batch_of_longest_texts_takes() -> None:
    llm = load(SPEC, 2**40)
    assert llm.engine.admission.limits.total == longest(llm, 2)
    assert llm.engine.admission.limits.kept == longest(llm, 2)
    assert taken(llm) == llm.memory["target_weights"] + longest(llm, 2)


def test_a_budget_makes_caches_smaller_and_texts_wait_but_no_smaller_than_one_text() -> None:
    llm = load(SPEC)
    weights, one = llm.memory["target_weights"], longest(llm, 1)
    assert load(SPEC, weights + one).engine.admission.limits.total == one
    with pytest.raises(ApiError, match="1 bytes too much") as caught:
        load(SPEC, weights + one - 1)
    assert caught.value.status == 507
    small = load(replace(SPEC, cache_bytes=one // 2, prefix_cache=False), weights + one // 2)
    assert (small.engine.admission.limits.total, small.engine.admission.limits.kept) == (one // 2, 0)


@pytest.mark.parametrize("spec", [SPEC, LaunchSpec("bundled"), replace(SPEC, draft="auto", cache_bytes=2**20)])
def test_what_is_estimated_before_is_what_loading_finds(spec: LaunchSpec) -> None:
    llm = load(spec)
    least = taken(llm) - llm.engine.admission.limits.total + min(longest(llm, 1), spec.cache_bytes or 2**40)
    assert footprint(spec) == pytest.approx(least, rel=0.2)


def test_flags_reach_the_launch() -> None:
    (launch,) = read_launches(ServeOptions(cache_bytes="3MiB", no_prefix_cache=True))
    assert (launch.spec.cache_bytes, launch.spec.prefix_cache) == (3 * 2**20, False)
    assert read_launches(ServeOptions(runtime="torch"))[0].spec.runtime == "torch"
    with pytest.raises(RequestError, match="runtime='x'"):
        read_launches(ServeOptions(runtime="x"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert read_launches(ServeOptions(chat_template=template))[0].spec.chat_template == template
    with pytest.raises(RequestError, match=r"chat_template='nope\.jinja' cannot be read"):
        read_launches(ServeOptions(chat_template="nope.jinja"))
    for wrong, said in (
        (ServeOptions(uid="a b"), r"--uid 'a b' is not usable; give 1 to 100 letters"),
        (ServeOptions(uid=""), r"--uid '' is not usable"),
        (ServeOptions(cache_bytes="3"), r"cache_bytes=3 is not usable; .* at least \d{6} \(0\.\d+ MiB\) here; give"),
        (ServeOptions(max_model_len=1), "--max-model-len 1 is not usable; it must be 2 or more"),
    ):
        with pytest.raises(RequestError, match=said):
            read_launches(wrong)
    with pytest.raises(RequestError, match="--allow-folder nowhere is no folder; give one that is there"):
        read_settings(ServeOptions(allow_folder=[Path("nowhere")]))
    assert read_launches(ServeOptions(no_model=True)) == ()
    with pytest.raises(
        RequestError,
        match=r"--no-model contradicts --draft int4, --trust-remote-code, --max-model-len 64; leave one out",
    ):
        read_launches(ServeOptions(no_model=True, draft="int4", trust_remote_code=True, max_model_len=64))
    assert (read_launches(ServeOptions())[0].spec.cache_bytes, read_launches(ServeOptions())[0].spec.prefix_cache) == (
        None,
        True,
    )
    with pytest.raises(RequestError, match="'much' is no size"):
        read_launches(ServeOptions(cache_bytes="much"))


def test_each_launch_is_told_what_the_others_leave() -> None:
    told: list[int | None] = []

    def load_model(spec: Any, uid: str, loop: Any, room: int | None) -> Any:
        told.append(room)
        return SimpleNamespace(info=SimpleNamespace(bytes=spec.took), drained=asyncio.Event().wait, close=lambda: None)

    async def launches() -> list[int | None]:
        models = Models(Loader(lambda spec: spec.needs, load_model), Limits(), 100)
        for name, needs, took in (("a", 10, 40), ("b", 50, 55), ("c", 6, 6), ("d", 5, 5)):
            entry = models.launch(SimpleNamespace(name=name, needs=needs, took=took, as_named=str), name)
            try:
                await models.launched(entry)
            except ApiError as error:
                assert (name, error.status) == ("c", 507) and "1 bytes too much" in error.message
        return [entry.bytes for entry in models.list()]

    assert asyncio.run(launches()) == [40, 55, 5]
    assert told == [100, 60, 5]
