"""Fills token masks with llguidance and xgrammar over the same schemas and texts as `apus bench grammar`, in one session.

    python -m venv venv && venv/bin/pip install llguidance xgrammar tokenizers
    venv/bin/python Scripts/bench_grammar.py --apus .build/release/apus --tokenizer tokenizer.json --schemas schemas.jsonl

Prints one row for each engine: schemas refused, valid texts rejected, and percentiles of compile and mask times in
microseconds; then the ratios of the others' times to Apus's. --every N takes every Nth line, so that few lines are a fair
sample of a sorted file. Each engine runs in a process of its own on one core. White space is flexible for all; a schema's compile time
is that of the first use, and a mask's time includes what is computed at its first use.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time


def lines(path, limit):
    with open(path) as file:
        for number, line in enumerate(file):
            if limit and number >= limit:
                return
            if not line.strip():
                continue
            value = json.loads(line)
            texts = list(value.get("instances", []))
            texts += [json.dumps(t["data"], ensure_ascii=False, separators=(",", ":"))
                      for t in value.get("tests", []) if t.get("valid")]
            yield value["schema"], texts


def percentile(values, percent):
    if not values:
        return 0.0
    values = sorted(values)
    position = percent / 100 * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (position - low)


def summary(values):
    scale = [v * 1e6 for v in values]
    return {"count": len(scale), "median": percentile(scale, 50), "p90": percentile(scale, 90),
            "p99": percentile(scale, 99), "max": max(scale, default=0.0)}


def run_llguidance(options):
    import llguidance
    import numpy
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    text = open(options.tokenizer).read()
    tokenizer = llguidance.LLTokenizer(text)
    mask = allocate_token_bitmask(1, tokenizer.vocab_size)
    compiles, fills, refused, rejected = [], [], 0, 0
    for schema, texts in lines(options.schemas, options.limit):
        start = time.perf_counter()
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": True})
            matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
        except Exception:
            refused += 1
            continue
        compiles.append(time.perf_counter() - start)
        for instance in texts:
            matcher.reset()
            accepted = True
            for token in tokenizer.tokenize_str(instance):
                start = time.perf_counter()
                fill_next_token_bitmask(matcher, mask)
                fills.append(time.perf_counter() - start)
                if not matcher.consume_token(token):
                    accepted = False
                    break
            rejected += not (accepted and matcher.is_accepting())
    return compiles, fills, refused, rejected


def run_xgrammar(options):
    import tokenizers
    import xgrammar

    fast = tokenizers.Tokenizer.from_file(options.tokenizer)
    vocabulary = fast.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values()) + 1
    table = [""] * size
    for text, token in vocabulary.items():
        table[token] = text
    information = xgrammar.TokenizerInfo(table, vocab_type=xgrammar.VocabType.BYTE_LEVEL, vocab_size=size)
    compiler = xgrammar.GrammarCompiler(information, max_threads=1, cache_enabled=False)
    mask = xgrammar.allocate_token_bitmask(1, size)
    compiles, fills, refused, rejected = [], [], 0, 0
    for schema, texts in lines(options.schemas, options.limit):
        start = time.perf_counter()
        try:
            grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        except Exception:
            refused += 1
            continue
        compiles.append(time.perf_counter() - start)
        for instance in texts:
            matcher = xgrammar.GrammarMatcher(grammar)
            accepted = True
            for token in fast.encode(instance, add_special_tokens=False).ids:
                start = time.perf_counter()
                matcher.fill_next_token_bitmask(mask)
                fills.append(time.perf_counter() - start)
                if not matcher.accept_token(token):
                    accepted = False
                    break
            rejected += not (accepted and matcher.is_completed() if hasattr(matcher, "is_completed") else accepted)
    return compiles, fills, refused, rejected


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apus", default=".build/release/apus")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--schemas", required=True)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", choices=["llguidance", "xgrammar"], help="runs one engine and prints its result as JSON")
    options = parser.parse_args()
    if options.only:
        run = run_llguidance if options.only == "llguidance" else run_xgrammar
        compiles, fills, refused, rejected = run(options)
        print(json.dumps({"compile_us": summary(compiles), "mask_us": summary(fills), "refused": refused,
                          "texts_rejected": rejected}))
        return
    schemas = options.schemas
    sample = None
    if options.every > 1:
        sample = tempfile.NamedTemporaryFile("w", suffix=".jsonl")
        with open(schemas) as file:
            sample.writelines(line for number, line in enumerate(file) if number % options.every == options.every - 1)
        sample.flush()
        schemas = sample.name
    common = ["--tokenizer", options.tokenizer, "--schemas", schemas, "--limit", str(options.limit)]
    commands = {"apus": [options.apus, "bench", "grammar", "--json", *common]}
    for name in ["llguidance", "xgrammar"]:
        commands[name] = [sys.executable, os.path.abspath(__file__), "--only", name, *common]
    print(f"{'':12}{'refused':>9}{'rejected':>9}{'compile p50':>13}{'p99':>11}{'mask p50':>11}{'p99':>11}{'max':>11}")
    results = {}
    for name, command in commands.items():
        done = subprocess.run(["taskset", "-c", "0", *command], capture_output=True, text=True)
        if done.returncode != 0:
            print(f"{name:12}failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        results[name] = result
        compiles, fills = result["compile_us"], result["mask_us"]
        print(f"{name:12}{result['refused']:>9}{result['texts_rejected']:>9}{compiles['median']:>13.1f}"
              f"{compiles['p99']:>11.1f}{fills['median']:>11.1f}{fills['p99']:>11.1f}{fills['max']:>11.1f}", flush=True)
    own = results.pop("apus", None)
    for name, result in results.items():
        def ratio(what, key):
            return result[what][key] / own[what][key] if own and own[what][key] else float("nan")
        print(f"{name + '/apus':30}{ratio('compile_us', 'median'):>13.2f}{ratio('compile_us', 'p99'):>11.2f}"
              f"{ratio('mask_us', 'median'):>11.2f}{ratio('mask_us', 'p99'):>11.2f}{ratio('mask_us', 'max'):>11.2f}")


if __name__ == "__main__":
    main()
