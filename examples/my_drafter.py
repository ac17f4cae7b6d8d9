"""A drafter of one's own: what most often followed the last token, learnt while the text grows."""

from collections import Counter, defaultdict

from foredraft import LLM, Draft, SamplingParams
from foredraft.drafters.base import NoDrafter


class BigramDrafter(NoDrafter):
    name = "bigram"

    def __init__(self):
        self.followers = defaultdict(Counter)
        self.counted = defaultdict(int)  # tokens looked at, by request

    def propose(self, requests, policy):
        return [self.draft(request, policy) for request in requests]

    def draft(self, request, policy):
        ids = request.token_ids
        for i in range(max(1, self.counted[request]), len(ids)):
            self.followers[ids[i - 1]][ids[i]] += 1
        self.counted[request] = len(ids)
        tokens, sure, last, wanted = [], [], ids[-1], request.draft_limit > 0
        while wanted and (counts := self.followers.get(last)):
            last, count = counts.most_common(1)[0]
            tokens.append(last)
            sure.append(count / counts.total())
            wanted = len(tokens) < request.draft_limit and policy.go_on(request, tuple(sure))
        return Draft(tuple(tokens), self.name, confidences=tuple(sure))

    def forget(self, request):
        self.counted.pop(request, None)


if __name__ == "__main__":
    llm = LLM(draft=BigramDrafter())
    for wish in ("a table for two in Oakland", "a hotel in London", "a table for four in Napa"):
        result = llm.generate(f"User: I need {wish}.\nAssistant:", SamplingParams(max_new_tokens=200))
        print(f"{result.text}\n{result.stats.accepted} of {result.stats.drafted} drafted tokens were right\n")
