"""The policy that no adapter answers unproven: replay its recorded probe in the engine before it serves requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapterhub.adapter import Adapter
from adapterhub.errors import ProbeMismatch
from adapterhub.package.manifest import Probe, ProbeAnswer
from adapterhub.probe import TOLERANCE, likely_cause, recorded_on
from serve.engine import AdapterScale, Engine, GenerationRequest, SamplingParams, TokenLogprob


class ProbedLoader:
    """Loads adapters into an engine; each must reproduce its recorded probe there, once per digest and process.

    On weights other than those the probe was recorded on, a mismatch is reported and does not stop the adapter.
    """

    def __init__(self, engine: Engine, *, replays: bool, report: Callable[[str], None]) -> None:
        """Load into `engine`. Without `replays`, probes are not replayed. `report` takes a line for the operator."""
        self._engine = engine
        self._replays = replays
        self._report = report
        self._passed: set[str] = set()

    async def load(self, adapter: Adapter) -> None:
        """Load `adapter` and replay its probe; unload it again on failure.

        Raises ProbeMismatch, and what loading and answering raise.
        """
        await self._engine.load(adapter)
        if adapter.digest in self._passed:
            return
        recorded, here = recorded_on(adapter.manifest), self._engine.precision
        is_elsewhere = here.weights != recorded
        if is_elsewhere:
            self._report(
                f"note: the probe of adapter {adapter.manifest.name} was recorded on {recorded} weights, as in "
                f"training; the base is {here}: answers may differ a little."
            )
        if not self._replays:
            return
        try:
            await replay(self._engine, adapter)
        except ProbeMismatch as error:
            if not is_elsewhere:
                await self._engine.unload(adapter.digest)
                raise
            self._report(f"note: {error}")
        except BaseException:
            await self._engine.unload(adapter.digest)
            raise
        self._passed.add(adapter.digest)


async def replay(engine: Engine, adapter: Adapter) -> None:
    """Send the loaded adapter its recorded prompts, all at once, and compare; does nothing without a recorded probe.

    First tokens' log-probabilities and all tokens up to the first near-tie must be the recorded ones within the wider
    tolerance of the two dtypes (adapterhub.probe). Raises ProbeMismatch.
    """
    recorded = adapter.probe
    if recorded is None:
        return
    answers = await _answers(engine, adapter, recorded)
    cause = likely_cause(adapter, fingerprint=None, weights=engine.precision.weights, dtype=engine.precision.dtype)
    for now, then in zip(answers, recorded.answers, strict=True):
        _compare(adapter, now, then, tolerance=_tolerance(engine, recorded), cause=cause)


async def _answers(engine: Engine, adapter: Adapter, recorded: Probe) -> list[list[TokenLogprob]]:
    asking = [asyncio.create_task(_answer(engine, adapter, *numbered)) for numbered in enumerate(recorded.answers)]
    try:
        return await asyncio.gather(*asking)
    finally:  # after a failure none may continue: the adapter is unloaded next
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


async def _answer(engine: Engine, adapter: Adapter, number: int, then: ProbeAnswer) -> list[TokenLogprob]:
    sampling = SamplingParams(
        max_tokens=len(then.tokens), temperature=0, ignore_eos=True, top_logprobs=len(then.top_tokens)
    )
    name = f"probe-{adapter.digest[7:19]}-{number}"
    request = GenerationRequest(name, tuple(then.prompt_tokens), sampling, (AdapterScale(adapter.digest),))
    return [one async for chunk in engine.generate(request) for one in chunk.logprobs]


def _tolerance(engine: Engine, recorded: Probe) -> float:
    return max(TOLERANCE[recorded.dtype], TOLERANCE[engine.dtype])


def _compare(adapter: Adapter, now: list[TokenLogprob], then: ProbeAnswer, *, tolerance: float, cause: str) -> None:
    likely = f"likely cause: {cause}. Verify it with `adapterhub verify --probe`, or pack it again."
    ours = {one.token: one.logprob for one in now[0].top}
    # Log-probabilities are logits plus a constant: the differences to the best token must agree.
    known = [(token, logit) for token, logit in zip(then.top_tokens, then.top_logits, strict=True) if token in ours]
    if not known:
        raise ProbeMismatch(
            f"{adapter.manifest.name} does not answer {then.prompt!r} as recorded: none of the {len(then.top_tokens)} "
            f"strongest first tokens is among the {len(ours)} strongest now; {likely}"
        )
    best = ours.get(then.top_tokens[0], min(ours.values()))  # not listed any more: at most the weakest listed
    for token, logit in known:
        lead, found = logit - then.top_logits[0], ours[token] - best
        if abs(lead - found) > 2 * tolerance:
            raise ProbeMismatch(
                f"{adapter.manifest.name} does not answer {then.prompt!r} as recorded: token {token} is {found:.3f} "
                f"from the best, recorded {lead:.3f} (tolerance {2 * tolerance}); {likely}"
            )
    for place, (mine, token, gap) in enumerate(zip(now, then.tokens, then.gaps, strict=True)):
        if gap < 2 * tolerance:
            return
        if mine.token != token:
            raise ProbeMismatch(
                f"{adapter.manifest.name} does not answer {then.prompt!r} as recorded: token {place} is {mine.token}, "
                f"recorded {token} with a lead of {gap:.2f}; {likely}"
            )
