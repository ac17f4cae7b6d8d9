"""Engine: the one loop, for plain and speculative, single, batched and served decoding.

Each step proposes drafts, checks them in one pass of the target, keeps what the target would have said, and commits it.
Knows nothing of text; stop rules come with the requests.
"""

import warnings
from time import perf_counter

import torch

from foredraft import sampling
from foredraft.drafters.base import Drafter
from foredraft.errors import ExactnessError, NumericsError, VocabularyMismatchError
from foredraft.models.base import CausalModel
from foredraft.models.rows import Span, plan
from foredraft.policy import DraftPolicy, PerRequest, StepTimes
from foredraft.scheduler import Scheduler, chunk_end
from foredraft.stats import SpecStats
from foredraft.types import Draft, FinishReason, Phase, Request, StepOutput, Verdict
from foredraft.verify import verify, verify_reached


class Engine:
    """Runs requests over a target and a drafter until each is finished.

    Every pass obeys the target's `row_invariance`, so that the tokens of a request are a function of the target, its
    prompt, parameters and seed alone.
    """

    def __init__(
        self, target: CausalModel, drafter: Drafter, policy: DraftPolicy, *, max_batch_size: int, max_model_len: int
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.policy = PerRequest(policy)
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(max_batch_size)
        self.stats = SpecStats()  # of the requests that have ended
        self.recomputed: set[Request] = set()  # whose next pass tells whether drafts spoilt the last one

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        request.arrived = perf_counter()
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Take a request out wherever it is, unless it has ended; what it has produced stays with it."""
        if request.phase is not Phase.FINISHED:
            self._finish(request, "abort")

    @torch.no_grad()
    def step(self) -> list[StepOutput]:
        """Advance every running request by one pass; return what reached the users.

        A request that cannot go on (its logits are not numbers, its own processor or stop rule fails) is aborted with
        its `error`; the others never notice.
        """
        began = perf_counter()
        requests = self.scheduler.next_batch()
        if not requests:
            return []
        drafts = self._propose(requests)
        drafted_at = perf_counter()
        spans = [self._span(request, draft) for request, draft in zip(requests, drafts, strict=True)]
        invariance = self.target.row_invariance
        rows = plan(spans, invariance.min_rows, invariance.key_multiple, invariance.row_multiple)
        logits = self.target.forward(rows)
        verified_at = perf_counter()
        outputs = self._commit_all(requests, drafts, spans, logits)
        self._account(outputs, drafts, len(rows.tokens), began, drafted_at, verified_at)
        return outputs

    def _propose(self, requests: list[Request]) -> list[Draft]:
        for request in requests:
            request.draft_limit = self._draft_limit(request)
        drafts = dict.fromkeys(requests, Draft())
        wanting = [request for request in requests if request.draft_limit > 0]
        if wanting:
            drafts.update(zip(wanting, self.drafter.propose(wanting, self.policy), strict=True))
        return [self._checked(draft, request) for request, draft in drafts.items()]

    def _draft_limit(self, request: Request) -> int:
        """How many tokens may be drafted: none in a prompt, none that could not be emitted."""
        if not request.decoding:
            return 0
        room = min(request.remaining, self.max_model_len - len(request.token_ids)) - 1
        return max(0, min(self.policy.start(request), room, self.target.row_invariance.max_draft_tokens))

    def _checked(self, draft: Draft, request: Request) -> Draft:
        if not draft.is_chain:
            raise ExactnessError(
                f"drafter {draft.source!r} proposed a tree (parents {draft.parents}); the engine verifies chains, as "
                "a branch's keys would lie elsewhere in the cache and change the bits: propose the likeliest path"
            )
        if len(draft) > request.draft_limit:
            raise ExactnessError(
                f"drafter {draft.source!r} proposed {len(draft)} tokens where {request.draft_limit} were allowed; "
                "stop at request.draft_limit"
            )
        vocab_size = self.target.vocab_size
        outside = next((token for token in draft.tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise VocabularyMismatchError(
                f"drafter {draft.source!r} proposed token {outside}, outside the target's {vocab_size} tokens; "
                "draft in the target's tokens"
            )
        return draft

    def _span(self, request: Request, draft: Draft) -> Span:
        end = chunk_end(request) if not request.decoding else len(request.token_ids)
        tokens = request.token_ids[request.cached : end] + list(draft.tokens)
        wanted = len(draft) + 1 if end == len(request.token_ids) else 0
        return Span(request.slot, request.cached, tokens, wanted)

    def _commit_all(
        self, requests: list[Request], drafts: list[Draft], spans: list[Span], logits: torch.Tensor
    ) -> list[StepOutput]:
        outputs, row = [], 0
        for request, draft, span in zip(requests, drafts, spans, strict=True):
            if span.wanted == 0:
                request.cached = span.start + len(span.tokens)
                continue
            outputs.append(self._commit_or_abort(request, draft, logits[row : row + span.wanted]))
            row += span.wanted
        return outputs

    def _commit_or_abort(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        try:
            return self._commit(request, draft, logits)
        except NumericsError as error:
            drafted = request.num_draft_tokens != 0 and (draft.tokens or request.stats.drafts)
            return self._without_drafts(request) if drafted else self._abort(request, error)
        except Exception as error:  # processors, stop rules, drafters and policies of a user's own may raise anything
            return self._abort(request, error)

    def _without_drafts(self, request: Request) -> StepOutput:
        """Compute the place again, alone: a guess may have left what is no number behind the last token, and a key that
        is masked still takes part in every sum.
        """
        self.target.cache.clear(request.slot, request.cached)
        request.num_draft_tokens = 0
        self.recomputed.add(request)
        return StepOutput(request, (), (), None)

    def _blame_drafts(self, request: Request) -> None:
        """The place has numbers without drafts, so that it was they."""
        self.recomputed.discard(request)
        warnings.warn(
            f"a guess of drafter {self.drafter.name!r} made the target's logits no numbers after "
            f"{len(request.token_ids)} tokens; this text goes on without drafts",
            RuntimeWarning,
            stacklevel=2,
        )

    def _abort(self, request: Request, error: Exception) -> StepOutput:
        self.target.cache.clear(request.slot)
        request.error = error
        self.abort(request)
        return StepOutput(request, (), (), "abort")

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        """Verify one draft [n] against logits [n + 1, V], and append what is kept up to where the request ends."""
        verdict = self._verify(draft, logits, request)
        if request in self.recomputed:
            self._blame_drafts(request)
        start = len(request.token_ids)
        kept = [draft.tokens[i] for i in verdict.accepted]
        reason: FinishReason | None = None
        for token in (*kept, verdict.next_token):
            request.token_ids.append(token)
            reason = self._ends(request, token)
            if reason:
                break
        added = tuple(request.token_ids[start:])
        flags = tuple(i < len(kept) for i in range(len(added)))
        request.from_draft += flags
        request.cached = len(request.token_ids) - 1
        if request.params.logprobs is not None:
            request.logprobs += sampling.logprobs(logits[: len(added)], added, request.params.logprobs)
        tested = len(added) if all(flags) else len(draft)  # a text that ends within its draft leaves the rest untested
        request.stats.count_pass(tested, sum(flags), len(added))
        self._observe(request, draft, verdict)
        if reason:
            self._finish(request, reason)
        return StepOutput(request, added, flags, reason)

    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        try:
            return verify(draft, logits, request)
        except Exception:  # a processor may mask all of a place the text never goes to, or raise there
            return verify_reached(draft, logits, request)

    def _ends(self, request: Request, token: int) -> FinishReason | None:
        stopped = token in request.stop_token_ids
        stopped = request.stop_rule(token) or stopped
        if stopped:
            return "stop"
        full = request.remaining <= 0 or len(request.token_ids) >= self.max_model_len
        return "length" if full else None

    def _observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        self.drafter.observe(request, verdict)
        self.policy.observe(request, draft, verdict)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.phase is Phase.RUNNING:
            self.target.cache.free(request.slot)
        self.scheduler.retire(request)
        self.recomputed.discard(request)
        request.finish_reason = reason
        request.stats.seconds_total = perf_counter() - request.arrived
        self.stats.add(request.stats)
        self.drafter.forget(request)
        self.policy.forget(request)

    def _account(
        self,
        outputs: list[StepOutput],
        drafts: list[Draft],
        rows: int,
        began: float,
        drafted_at: float,
        verified_at: float,
    ) -> None:
        """Share the step's seconds among its requests, and tell the policy what a decoding step costs."""
        ended = perf_counter()
        share = 1 / max(1, len(drafts))
        for output in outputs:
            stats = output.request.stats
            stats.seconds_drafting += (drafted_at - began) * share
            stats.seconds_verifying += (verified_at - drafted_at) * share
            stats.seconds_other += (ended - verified_at) * share
            if not stats.seconds_to_first_token:
                stats.seconds_to_first_token = ended - output.request.arrived
        if len(outputs) == len(drafts) and outputs:
            drafted = sum(map(len, drafts))
            emitted = sum(len(output.token_ids) for output in outputs)
            self.policy.observe_times(
                StepTimes(
                    len(drafts), drafted, rows, emitted, drafted_at - began, verified_at - drafted_at, ended - began
                )
            )
