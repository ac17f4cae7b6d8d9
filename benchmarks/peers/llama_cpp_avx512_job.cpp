// llama.cpp through the libraries of npm's node-llama-cpp, which have AVX-512 kernels: one job from stdin, its outputs and
// seconds to stdout. See run.py for the form.
//
// The loop is llama.cpp's own examples/speculative-simple with its own drafting (common_speculative_*) and sampler; plain
// decoding is the same loop without a draft. Two things differ from its defaults, for the better by a factor of 50 on two
// cores: both models share one pool of threads (two pools spin against each other), and drafts are sampled outside the
// graph. Usage: llama_cpp_avx512_job FOLDER_OF_LIBRARIES VERSION < JOB
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

#include "common.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"
#include "log.h"
#include "nlohmann/json.hpp"
#include "sampling.h"
#include "speculative.h"

using json = nlohmann::json;

static const llama_seq_id SEQUENCE = 0;

struct Engine {
    common_params params;
    common_init_result_ptr target;
    common_speculative_init_result_ptr draft;  // none: plain decoding
    llama_context * context;
    llama_context * draft_context = nullptr;
};

static common_params parameters(const json & job) {
    common_params params;
    params.model.path = job["target"];
    params.n_ctx = job["context"];
    params.n_parallel = 1;
    params.warmup = false;
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"];
    params.sampling.samplers = {COMMON_SAMPLER_TYPE_TOP_K};
    params.sampling.top_k = 1;
    params.sampling.temp = 0.0f;
    const std::string draft = job["draft"];
    if (!draft.empty()) {
        auto & spec = params.speculative;
        spec.types = {COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE};
        spec.draft.mparams.path = draft;
        spec.draft.n_max = job["num_draft_tokens"];
        spec.draft.backend_sampling = false;
        spec.draft.cpuparams.n_threads = spec.draft.cpuparams_batch.n_threads = job["threads"];
        const auto limits = common_speculative_get_output_limits(params.n_batch, 1, common_speculative_n_max(&spec));
        params.n_outputs_max = limits.total;
        params.n_outputs_max_per_seq = limits.per_seq;
    }
    return params;
}

static void share_threads(const Engine & engine, int threads) {
    auto * device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto * found = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_threadpool_new");
    auto params = ggml_threadpool_params_default(threads);
    auto * pool = reinterpret_cast<decltype(ggml_threadpool_new) *>(found)(&params);  // lives as long as we do
    llama_attach_threadpool(engine.context, pool, nullptr);
    llama_attach_threadpool(engine.draft_context, pool, nullptr);
}

static void load(Engine & engine, const json & job) {
    engine.params = parameters(job);
    auto & params = engine.params;
    engine.target = common_init_from_params(params);
    engine.context = engine.target->context();
    if (params.speculative.draft.mparams.path.empty()) return;
    common_params own = common_base_params_to_speculative(params);
    engine.draft = common_speculative_init_from_params(own, engine.target->model(), engine.context);
    engine.draft_context = engine.draft->context();
    share_threads(engine, job["threads"]);
    params.speculative.draft.ctx_tgt = engine.context;
    params.speculative.draft.ctx_dft = engine.draft_context;
}

// One text, from an empty cache.
class Text {
    Engine & engine;
    common_sampler_ptr sampler;
    common_speculative_ptr speculative;
    llama_batch batch;
    llama_tokens before, drafted;  // what is in the cache; what is tried beyond it
    llama_token last;

public:
    int tried = 0, accepted = 0;

    Text(Engine & engine, const llama_tokens & prompt)
        : engine(engine),
          sampler(common_sampler_init(engine.target->model(), engine.params.sampling)),
          batch(llama_batch_init(llama_n_batch(engine.context), 0, 1)),
          before(prompt.begin(), prompt.end() - 1),
          last(prompt.back()) {
        cut(0);
        if (engine.draft) speculative.reset(common_speculative_init(engine.params.speculative, 1));
        for (size_t i = 0; i < before.size(); ++i) common_batch_add(batch, before[i], i, {SEQUENCE}, false);
        decode();
        if (speculative) common_speculative_begin(speculative.get(), SEQUENCE, before);
    }

    ~Text() { llama_batch_free(batch); }

    // Appends what one pass of the target makes certain.
    void step(llama_tokens & output, int most) {
        propose(most);
        common_batch_clear(batch);
        common_batch_add(batch, last, before.size(), {SEQUENCE}, true);
        for (size_t i = 0; i < drafted.size(); ++i)
            common_batch_add(batch, drafted[i], before.size() + 1 + i, {SEQUENCE}, true);
        decode();
        const auto kept = common_sampler_sample_and_accept_n(sampler.get(), engine.context, drafted);
        if (speculative) common_speculative_accept(speculative.get(), SEQUENCE, kept.size() - 1);
        tried += drafted.size();
        accepted += kept.size() - 1;
        for (const llama_token token : kept) {
            before.push_back(last);
            last = token;
            output.push_back(token);
        }
        if (speculative) cut(before.size());
    }

private:
    void propose(int most) {
        drafted.clear();
        if (!speculative || most < 2) return;
        common_speculative_get_draft_params(speculative.get(), SEQUENCE) = {
            true, most - 1, (llama_pos) before.size(), last, &before, &drafted};
        common_speculative_draft(speculative.get());
        llama_memory_seq_rm(llama_get_memory(engine.draft_context), SEQUENCE, before.size(), -1);
    }

    void decode() {
        const bool well = llama_decode(engine.context, batch) == 0;
        if (!well || (speculative && !common_speculative_process(speculative.get(), batch))) {
            std::fprintf(stderr, "llama.cpp did not decode a batch of %d\n", batch.n_tokens);
            std::exit(1);
        }
    }

    void cut(llama_pos from) {
        llama_memory_seq_rm(llama_get_memory(engine.context), SEQUENCE, from, -1);
        if (engine.draft_context) llama_memory_seq_rm(llama_get_memory(engine.draft_context), SEQUENCE, from, -1);
    }
};

static json run(Engine & engine, const llama_tokens & prompt, size_t count) {
    const auto began = std::chrono::steady_clock::now();
    llama_tokens output;
    Text text(engine, prompt);
    while (output.size() < count) text.step(output, (int) (count - output.size()));
    output.resize(count);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
    return {{"output", output}, {"tokens", output.size()}, {"seconds", seconds.count()},
            {"drafted", text.tried}, {"accepted", text.accepted}};
}

static void ignore(ggml_log_level, const char *, void *) {}

int main(int, char ** argv) {
    const int out = dup(1);
    dup2(2, 1);  // what llama.cpp prints is not ours
    const json job = json::parse(std::cin);
    llama_log_set(ignore, nullptr);
    common_log_set_verbosity_thold(-1);
    ggml_backend_load_all_from_path(argv[1]);
    llama_backend_init();
    Engine engine;
    load(engine, job);
    const std::vector<llama_tokens> prompts = job["prompts"];
    run(engine, prompts[0], job["max_new_tokens"]);
    json results = json::array();
    for (const auto & prompt : prompts) results.push_back(run(engine, prompt, job["max_new_tokens"]));
    const std::string answer = json({{"results", results}, {"version", argv[2]}}).dump() + "\n";
    const bool written = write(out, answer.data(), answer.size()) == (ssize_t) answer.size();
    _exit(written ? 0 : 1);
}
