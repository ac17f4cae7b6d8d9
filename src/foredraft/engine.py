"""Engine: the one loop, for plain and speculative, single, batched and served decoding.

Each step proposes drafts, checks them in one pass of the target, keeps what the target would have said, and commits it.
Knows nothing of text; stop rules come with the requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from foredraft import sampling
from foredraft.accounting import Clock, Pace, account, teach
from foredraft.admission import Admission, CacheLimits, take_over
from foredraft.drafters import forced
from foredraft.drafters.base import Drafter, NoDrafter, check_draft
from foredraft.errors import ForedraftError, NumericsError, RequestError
from foredraft.models.base import Cache, CausalModel
from foredraft.models.rows import Span, plan
from foredraft.policy import DraftPolicy, PerRequest
from foredraft.scheduler import Scheduler
from foredraft.spoilt import Spoilt
from foredraft.stats import SpecStats
from foredraft.types import Draft, FinishReason, Phase, Request, StepOutput, Verdict
from foredraft.verify import verify, verify_reached

NOTHING = Draft()


class Engine:
    """Runs requests over a target and a drafter until each is finished.

    Every pass obeys the target's `row_invariance`, so that the tokens of a request are a function of the target, its
    prompt, parameters and seed alone.
    """

    def __init__(
        self,
        target: CausalModel,
        drafter: Drafter,
        policy: DraftPolicy,
        *,
        max_batch_size: int,
        max_model_len: int,
        limits: CacheLimits | None = None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.policy = PerRequest(policy)
        self.max_model_len = max_model_len
        self.admission = Admission(limits or CacheLimits(), max_model_len, self.caches)
        self.scheduler = Scheduler(max_batch_size, fits=self.admission.fits)
        self.pace: Pace | None = None
        self.stats = SpecStats()  # of the requests that have ended
        self.spoilt = Spoilt()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter, so that there is something to decide."""
        return type(self.drafter) is not NoDrafter

    def caches(self) -> list[Cache]:
        """The target's, and those that drafters have of their own."""
        return [self.target.cache, *getattr(self.drafter, "caches", ())]

    def use(self, drafter: Drafter | None = None, policy: DraftPolicy | None = None) -> None:
        """Draft with another drafter, or by another policy, from here on.

        Raises:
            RequestError: requests run.
        """
        if self.has_work:
            raise RequestError("requests run; a drafter or policy can change only when they have ended")
        self.drafter = self.drafter if drafter is None else drafter
        self.policy = self.policy if policy is None else PerRequest(policy)

    def keep_pace(self) -> None:
        """From here on long prompts let running texts go on at half speed or more, and take longer themselves."""
        self.pace, self.scheduler.cuts = Pace(), self.target.row_invariance.cuts

    @contextmanager
    def using(self, drafter: Drafter | None = None, policy: DraftPolicy | None = None) -> Iterator[None]:
        """`use`, until the block ends."""
        before = self.drafter, self.policy
        self.use(drafter, policy)
        try:
            yield
        finally:
            self.drafter, self.policy = before

    def add(self, request: Request) -> None:
        """Let a request wait for its turn. Raises RequestError where the caches could never hold it."""
        self.admission.check(request)
        request.arrived = request.arrived or perf_counter()
        request.may_draft &= request.num_draft_tokens != 0 and self.drafts
        request.steering.mind(drafts=request.may_draft)
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Take a request out wherever it is, unless it has ended; what it has produced stays with it."""
        if request.phase is not Phase.FINISHED:
            self._finish(request, "abort")

    def fail(self, request: Request, error: Exception) -> None:
        """`abort` for a reason; a request that has ended already has failed all the same."""
        request.error = error
        request.finish_reason = "error"
        if request.phase is not Phase.FINISHED:
            self._finish(request, "error")

    def step(self) -> list[StepOutput]:
        """Advance those whose turn it is by one pass; return what reached the users.

        A request that cannot go on (its logits are not numbers, its own processor or stop rule fails) ends with its
        `error`, and the others never notice. If the whole step fails (the model, the cache's memory, the drafter), all
        that took part end with that error.
        """
        self._admit()
        if self.pace is not None:
            self.scheduler.budget_beside = self.pace.budget(self.scheduler.prefill_budget)
        requests = self.scheduler.next_batch()
        if not requests:
            return []
        grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)  # `no_grad` takes ten microseconds
        try:
            outputs = self._run(requests)
        except Exception as error:
            outputs = [self._failed(request, error) for request in requests]
        finally:
            torch.set_grad_enabled(grad)
        for output in outputs:
            if output.finish_reason:
                self._finish(output.request, output.finish_reason)
        return outputs

    def _admit(self) -> None:
        """Let in who fits, and take over what others have computed of prompts."""
        if self.scheduler.admit():
            self.admission.settle(self.scheduler.running)
        cache = self.target.cache
        self.scheduler.page = cache.page if cache.sharing else 0
        for request in self.scheduler.running:
            if not request.decoding:
                take_over(cache, request)

    def _run(self, requests: list[Request]) -> list[StepOutput]:
        clock = Clock()
        for request in requests:
            request.started = request.started or clock.began
        read = sum([request.reach - request.cached for request in requests if not request.decoding])
        rests = self.drafts and self.policy.rests
        drafts = self._propose(requests, rests=rests)
        clock.drafted = perf_counter()
        spans = [self._span(request, draft) for request, draft in zip(requests, drafts, strict=True)]
        invariance = self.target.row_invariance
        rows = plan(spans, invariance.min_rows, invariance.key_multiple, invariance.row_multiple)
        logits = self.target.forward(rows)
        clock.verified = perf_counter()
        outputs = self._commit_all(requests, drafts, spans, logits)
        for request in requests:
            self.target.cache.publish(request.slot, request.token_ids, request.cached, request.memory)
        clock.stop()
        account(requests, outputs, self.drafter, clock)
        if self.pace is not None:
            self.pace.took(clock.ended - clock.began, read)
        if self.drafts and len(outputs) == len(requests):
            drafted, total = sum(map(len, drafts)), clock.ended - clock.began
            if not (rests and not drafted and not read and self.policy.rested(len(outputs), total)):
                teach(self.policy, outputs, spans, len(rows.tokens), drafted, clock)
        return outputs

    def _propose(self, requests: list[Request], *, rests: bool = False) -> list[Draft]:
        """A draft for each request. While the policy rests, only for those that ask for one and for forced tokens."""
        for request in requests:
            request.lead, request.draft_limit = (), 0
            asks = not rests or request.num_draft_tokens is not None or request.steering.constraint is not None
            if asks and request.may_draft:
                request.draft_limit = self._draft_limit(request)  # and the lead
        wanting = [request for request in requests if request.draft_limit > 0]
        if not wanting:
            return [NOTHING] * len(requests)
        drafts = dict.fromkeys(requests, NOTHING)
        for request, draft in zip(wanting, forced.propose(self.drafter, wanting, self.policy), strict=True):
            drafts[request] = self._accepted(draft, request)
        return list(drafts.values())

    def _accepted(self, draft: Draft, request: Request) -> Draft:
        """The draft, or none and the request's error where it is not one that the target can verify."""
        try:
            check_draft(draft, request.draft_limit, self.target.vocab_size)
        except ForedraftError as error:
            request.error = error
            return NOTHING
        return draft

    def _draft_limit(self, request: Request) -> int:
        """How many tokens may be drafted: none in a prompt, none that could not be emitted."""
        if not (request.decoding and request.steering.follows_drafts):
            return 0
        wanted = self.policy.start(request)
        if not wanted and request.steering.constraint is None:
            return 0
        room = min(request.remaining, self.max_model_len - len(request.token_ids)) - 1
        room = max(0, min(room, self.target.row_invariance.max_draft_tokens))
        request.lead = forced.lead(request, room)
        return max(len(request.lead), min(wanted, room))

    def _span(self, request: Request, draft: Draft) -> Span:
        end = len(request.token_ids) if request.decoding else request.reach
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
            own = logits if len(spans) == 1 else logits[row : row + span.wanted]
            outputs.append(self._commit_or_fail(request, draft, own))
            row += span.wanted
        return outputs

    def _commit_or_fail(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        try:
            if request.error is not None:
                raise request.error
            return self._commit(request, draft, logits)
        except NumericsError as error:
            drafted = request.may_draft and (draft.tokens or request.stats.drafts)
            return self.spoilt.again(request, self.target.cache, error) if drafted else self._failed(request, error)
        except Exception as error:  # processors, stop rules, drafters and policies of a user's own may raise anything
            return self._failed(request, error)

    def _failed(self, request: Request, error: Exception) -> StepOutput:
        request.error = error
        return StepOutput(request, (), (), "error")

    def _commit(self, request: Request, draft: Draft, logits: torch.Tensor) -> StepOutput:
        """Verify one draft [n] against logits [n + 1, V], and append what is kept up to where the request ends."""
        verdict = self._verify(draft, logits, request)
        self.spoilt.settle(request, self.drafter.name)
        start = len(request.token_ids)
        reason = self._append(request, (*[draft.tokens[i] for i in verdict.accepted], verdict.next_token))
        added = tuple(request.token_ids[start:])
        request.steering.commit(added, ended=reason is not None)
        accepted = min(len(verdict.accepted), len(added))
        flags = (True,) * accepted + (False,) * (len(added) - accepted)
        request.from_draft += flags
        request.cached = len(request.token_ids) - 1
        if request.params.logprobs is not None:
            request.logprobs += sampling.logprobs(logits[: len(added)], added, request.params.logprobs)
        tested = len(added) if all(flags) else len(draft)  # a text that ends within its draft leaves the rest untested
        request.stats.count_pass(tested, accepted, len(added))
        if tested:
            forced.count(request, draft, tested, accepted)
        self._observe(request, draft, verdict)
        return StepOutput(request, added, flags, reason, draft.source)

    def _verify(self, draft: Draft, logits: torch.Tensor, request: Request) -> Verdict:
        try:
            return verify(draft, logits, request)
        except Exception:  # a processor may mask all of a place the text never goes to, or raise there
            if not draft.tokens:
                raise
            return verify_reached(draft, logits, request)

    def _append(self, request: Request, tokens: tuple[int, ...]) -> FinishReason | None:
        """Append tokens up to the first that ends the request; say how it does."""
        for token in tokens:
            request.token_ids.append(token)
            reason = self._ends(request, token)
            if reason:
                return reason
        return None

    def _ends(self, request: Request, token: int) -> FinishReason | None:
        if request.stop_rule(token) or token in request.stop_token_ids:
            return "stop"
        most = min(request.prompt_len + request.params.max_new_tokens, self.max_model_len)
        return "length" if len(request.token_ids) >= most else None

    def _observe(self, request: Request, draft: Draft, verdict: Verdict) -> None:
        if request.draft_limit:  # else no draft was asked for
            self.drafter.observe(request, verdict)
            self.policy.observe(request, *forced.beyond(request, draft, verdict))

    def _finish(self, request: Request, reason: FinishReason) -> None:
        """Free all that a request holds, and add its counters to the totals."""
        was_running = request.phase is Phase.RUNNING
        self.scheduler.retire(request)
        if was_running:
            self.admission.settle(self.scheduler.running)
            self.target.cache.free(request.slot)
        self.spoilt.forget(request)
        request.finish_reason = reason
        request.stats.seconds_total = perf_counter() - request.arrived
        self.stats.add(request.stats)
        if reason == "error" and request.slot >= 0:
            self.target.cache.clear(request.slot)  # it may hold NaN
        for forget in (self.drafter.forget, self.policy.forget):
            try:
                forget(request)
            except Exception as error:  # of a user's own
                self.fail(request, error)
