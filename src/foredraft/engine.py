"""Engine: the one loop, for plain and speculative, single, batched and served decoding.

Each step proposes drafts, checks them in one pass of the target, keeps what the target would have said, and commits it.
Knows nothing of text; stop rules come with the sequences.
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
from foredraft.types import Draft, FinishReason, Phase, Sequence, StepOutput, Verdict
from foredraft.verify import verify, verify_reached


class Engine:
    """Runs sequences over a target and a drafter until each is finished.

    Every pass obeys the target's `row_invariance`, so that the tokens of a sequence are a function of the target, its
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
        self.stats = SpecStats()  # of the sequences that have ended
        self.recomputed: set[Sequence] = set()  # whose next pass tells whether drafts spoilt the last one

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, sequence: Sequence) -> None:
        sequence.arrived = perf_counter()
        self.scheduler.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Take a sequence out wherever it is, unless it has ended; what it has produced stays with it."""
        if sequence.phase is not Phase.FINISHED:
            self._finish(sequence, "abort")

    @torch.no_grad()
    def step(self) -> list[StepOutput]:
        """Advance every running sequence by one pass; return what reached the users.

        A sequence that cannot go on (its logits are not numbers, its own processor or stop rule fails) is aborted with
        its `error`; the others never notice.
        """
        began = perf_counter()
        sequences = self.scheduler.next_batch()
        if not sequences:
            return []
        drafts = self._propose(sequences)
        drafted_at = perf_counter()
        spans = [self._span(sequence, draft) for sequence, draft in zip(sequences, drafts, strict=True)]
        invariance = self.target.row_invariance
        rows = plan(spans, invariance.min_rows, invariance.key_multiple, invariance.row_multiple)
        logits = self.target.forward(rows)
        verified_at = perf_counter()
        outputs = self._commit_all(sequences, drafts, spans, logits)
        self._account(outputs, drafts, len(rows.tokens), began, drafted_at, verified_at)
        return outputs

    def _propose(self, sequences: list[Sequence]) -> list[Draft]:
        for sequence in sequences:
            sequence.draft_limit = self._draft_limit(sequence)
        drafts = dict.fromkeys(sequences, Draft())
        wanting = [sequence for sequence in sequences if sequence.draft_limit > 0]
        if wanting:
            drafts.update(zip(wanting, self.drafter.propose(wanting, self.policy), strict=True))
        return [self._checked(draft, sequence) for sequence, draft in drafts.items()]

    def _draft_limit(self, sequence: Sequence) -> int:
        """How many tokens may be drafted: none in a prompt, none that could not be emitted."""
        if not sequence.decoding:
            return 0
        room = min(sequence.remaining, self.max_model_len - len(sequence.token_ids)) - 1
        return max(0, min(self.policy.start(sequence), room, self.target.row_invariance.max_draft_tokens))

    def _checked(self, draft: Draft, sequence: Sequence) -> Draft:
        if not draft.is_chain:
            raise ExactnessError(
                f"drafter {draft.source!r} proposed a tree (parents {draft.parents}); the engine verifies chains, as "
                "a branch's keys would lie elsewhere in the cache and change the bits: propose the likeliest path"
            )
        if len(draft) > sequence.draft_limit:
            raise ExactnessError(
                f"drafter {draft.source!r} proposed {len(draft)} tokens where {sequence.draft_limit} were allowed; "
                "stop at sequence.draft_limit"
            )
        vocab_size = self.target.vocab_size
        outside = next((token for token in draft.tokens if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise VocabularyMismatchError(
                f"drafter {draft.source!r} proposed token {outside}, outside the target's {vocab_size} tokens; "
                "draft in the target's tokens"
            )
        return draft

    def _span(self, sequence: Sequence, draft: Draft) -> Span:
        end = chunk_end(sequence) if not sequence.decoding else len(sequence.token_ids)
        tokens = sequence.token_ids[sequence.cached : end] + list(draft.tokens)
        wanted = len(draft) + 1 if end == len(sequence.token_ids) else 0
        return Span(sequence.slot, sequence.cached, tokens, wanted)

    def _commit_all(
        self, sequences: list[Sequence], drafts: list[Draft], spans: list[Span], logits: torch.Tensor
    ) -> list[StepOutput]:
        outputs, row = [], 0
        for sequence, draft, span in zip(sequences, drafts, spans, strict=True):
            if span.wanted == 0:
                sequence.cached = span.start + len(span.tokens)
                continue
            outputs.append(self._commit_or_abort(sequence, draft, logits[row : row + span.wanted]))
            row += span.wanted
        return outputs

    def _commit_or_abort(self, sequence: Sequence, draft: Draft, logits: torch.Tensor) -> StepOutput:
        try:
            return self._commit(sequence, draft, logits)
        except NumericsError as error:
            drafted = sequence.num_draft_tokens != 0 and (draft.tokens or sequence.stats.drafts)
            return self._without_drafts(sequence) if drafted else self._abort(sequence, error)
        except Exception as error:  # processors, stop rules, drafters and policies of a user's own may raise anything
            return self._abort(sequence, error)

    def _without_drafts(self, sequence: Sequence) -> StepOutput:
        """Compute the place again, alone: a guess may have left what is no number behind the last token, and a key that
        is masked still takes part in every sum.
        """
        self.target.cache.clear(sequence.slot, sequence.cached)
        sequence.num_draft_tokens = 0
        self.recomputed.add(sequence)
        return StepOutput(sequence, (), (), None)

    def _blame_drafts(self, sequence: Sequence) -> None:
        """The place has numbers without drafts, so that it was they."""
        self.recomputed.discard(sequence)
        warnings.warn(
            f"a guess of drafter {self.drafter.name!r} made the target's logits no numbers after "
            f"{len(sequence.token_ids)} tokens; this text goes on without drafts",
            RuntimeWarning,
            stacklevel=2,
        )

    def _abort(self, sequence: Sequence, error: Exception) -> StepOutput:
        self.target.cache.clear(sequence.slot)
        sequence.error = error
        self.abort(sequence)
        return StepOutput(sequence, (), (), "abort")

    def _commit(self, sequence: Sequence, draft: Draft, logits: torch.Tensor) -> StepOutput:
        """Verify one draft [n] against logits [n + 1, V], and append what is kept up to where the request ends."""
        verdict = self._verify(draft, logits, sequence)
        if sequence in self.recomputed:
            self._blame_drafts(sequence)
        start = len(sequence.token_ids)
        kept = [draft.tokens[i] for i in verdict.accepted]
        reason: FinishReason | None = None
        for token in (*kept, verdict.next_token):
            sequence.token_ids.append(token)
            reason = self._ends(sequence, token)
            if reason:
                break
        added = tuple(sequence.token_ids[start:])
        flags = tuple(i < len(kept) for i in range(len(added)))
        sequence.from_draft += flags
        sequence.cached = len(sequence.token_ids) - 1
        if sequence.params.logprobs is not None:
            sequence.logprobs += sampling.logprobs(logits[: len(added)], added, sequence.params.logprobs)
        tested = len(added) if all(flags) else len(draft)  # a text that ends within its draft leaves the rest untested
        sequence.stats.count_pass(tested, sum(flags), len(added))
        self._observe(sequence, draft, verdict)
        if reason:
            self._finish(sequence, reason)
        return StepOutput(sequence, added, flags, reason)

    def _verify(self, draft: Draft, logits: torch.Tensor, sequence: Sequence) -> Verdict:
        try:
            return verify(draft, logits, sequence)
        except Exception:  # a processor may mask all of a place the text never goes to, or raise there
            return verify_reached(draft, logits, sequence)

    def _ends(self, sequence: Sequence, token: int) -> FinishReason | None:
        stopped = token in sequence.stop_token_ids
        stopped = sequence.stop_rule(token) or stopped
        if stopped:
            return "stop"
        full = sequence.remaining <= 0 or len(sequence.token_ids) >= self.max_model_len
        return "length" if full else None

    def _observe(self, sequence: Sequence, draft: Draft, verdict: Verdict) -> None:
        self.drafter.observe(sequence, verdict)
        self.policy.observe(sequence, draft, verdict)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.retire(sequence)
        self.recomputed.discard(sequence)
        sequence.finish_reason = reason
        sequence.stats.seconds_total = perf_counter() - sequence.arrived
        self.stats.add(sequence.stats)
        self.drafter.forget(sequence)
        self.policy.forget(sequence)

    def _account(
        self,
        outputs: list[StepOutput],
        drafts: list[Draft],
        rows: int,
        began: float,
        drafted_at: float,
        verified_at: float,
    ) -> None:
        """Share the step's seconds among its sequences, and tell the policy what a decoding step costs."""
        ended = perf_counter()
        share = 1 / max(1, len(drafts))
        for output in outputs:
            stats = output.sequence.stats
            stats.seconds_drafting += (drafted_at - began) * share
            stats.seconds_verifying += (verified_at - drafted_at) * share
            stats.seconds_other += (ended - verified_at) * share
            if not stats.seconds_to_first_token:
                stats.seconds_to_first_token = ended - output.sequence.arrived
        if len(outputs) == len(drafts) and outputs:
            drafted = sum(map(len, drafts))
            emitted = sum(len(output.token_ids) for output in outputs)
            self.policy.observe_times(
                StepTimes(
                    len(drafts), drafted, rows, emitted, drafted_at - began, verified_at - drafted_at, ended - began
                )
            )
