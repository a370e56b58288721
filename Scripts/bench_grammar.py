"""Fills token masks with llguidance and xgrammar over the same schemas and texts as `apus bench grammar`, in one session.

    python -m venv venv && venv/bin/pip install llguidance xgrammar tokenizers
    venv/bin/python Scripts/bench_grammar.py --apus .build/release/apus --tokenizer tokenizer.json --schemas schemas.jsonl

Prints one row for each engine: schemas refused and timed out, valid texts rejected, and percentiles of compile and mask
times in microseconds; then the ratios of the others' times to Apus's. --every N takes every Nth line, so that few lines are
a fair sample of a sorted file. Each engine runs in a process of its own on one core. White space is flexible for all; a
schema's compile time is that of the first use, and a mask's time includes what is computed at its first use.

llguidance and xgrammar get --seconds for each schema, compiling and masks together. One that takes longer is counted as timed
out; what it had compiled and filled by then counts, and where it had not compiled the limit stands for its compile time.

To run in pieces, give --state FILE: engines named by --engines go on where the file says that they stopped, for at most
--budget seconds, and the table is of what the file has.
"""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time

ENGINES = ["apus", "llguidance", "xgrammar"]


def texts_of(value):
    texts = list(value.get("instances", []))
    return texts + [json.dumps(t["data"], ensure_ascii=False, separators=(",", ":"))
                    for t in value.get("tests", []) if t.get("valid")]


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


class LLGuidance:
    def __init__(self, path):
        import llguidance
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        self.library = llguidance
        self.fill = fill_next_token_bitmask
        self.tokenizer = llguidance.LLTokenizer(open(path).read())
        self.mask = allocate_token_bitmask(1, self.tokenizer.vocab_size)

    def tokens(self, text):
        return self.tokenizer.tokenize_str(text)

    def compile(self, schema):
        matcher = self.library.LLMatcher
        grammar = matcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": True})
        made = matcher(self.tokenizer, grammar, log_level=0)
        if made.is_error():
            raise ValueError(made.get_error())
        return made

    def start(self, compiled):
        compiled.reset()
        return compiled

    def fill_mask(self, matcher):
        self.fill(matcher, self.mask)

    def accept(self, matcher, token):
        return matcher.consume_token(token)

    def is_complete(self, matcher):
        return matcher.is_accepting()


class XGrammar:
    def __init__(self, path):
        import tokenizers
        import xgrammar

        self.library = xgrammar
        self.tokenizer = tokenizers.Tokenizer.from_file(path)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        table = [""] * size
        for text, token in vocabulary.items():
            table[token] = text
        information = xgrammar.TokenizerInfo(table, vocab_type=xgrammar.VocabType.BYTE_LEVEL, vocab_size=size)
        self.compiler = xgrammar.GrammarCompiler(information, max_threads=1, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, size)

    def tokens(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def compile(self, schema):
        return self.compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)

    def start(self, compiled):
        return self.library.GrammarMatcher(compiled)

    def fill_mask(self, matcher):
        matcher.fill_next_token_bitmask(self.mask)

    def accept(self, matcher, token):
        return matcher.accept_token(token)

    def is_complete(self, matcher):
        return matcher.is_completed() if hasattr(matcher, "is_completed") else True


def serve(name, path):
    """Answers lines that hold a schema and texts with lines of measurements: first the compile time, then each text's."""
    engine = {"llguidance": LLGuidance, "xgrammar": XGrammar}[name](path)
    # What a library prints itself must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value):
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer({"ready": True})
    for line in sys.stdin:
        value = json.loads(line)
        begin = time.perf_counter()
        try:
            compiled = engine.compile(value["schema"])
        except Exception:
            answer({"refused": True, "done": True})
            continue
        answer({"compile": time.perf_counter() - begin})
        for text in value["texts"]:
            matcher = engine.start(compiled)
            fills, accepted = [], True
            for token in engine.tokens(text):
                begin = time.perf_counter()
                engine.fill_mask(matcher)
                fills.append(time.perf_counter() - begin)
                if not engine.accept(matcher, token):
                    accepted = False
                    break
            answer({"fills": fills, "rejected": not (accepted and engine.is_complete(matcher))})
        answer({"done": True})


class Worker:
    """An engine in a process that is ended and started anew when a schema takes too long."""

    def __init__(self, name, path):
        self.command = ["taskset", "-c", "0", sys.executable, os.path.abspath(__file__), "--serve", name,
                        "--tokenizer", path]
        self.process = None

    def start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.rest = b""
        return self.line(120) is not None

    def line(self, seconds):
        end = time.monotonic() + seconds
        while b"\n" not in self.rest:
            wait = end - time.monotonic()
            if wait <= 0 or not select.select([self.process.stdout], [], [], wait)[0]:
                return None
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                return None
            self.rest += piece
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def measure(self, value, seconds, result):
        if not self.process and not self.start():
            raise RuntimeError("the engine does not start")
        self.process.stdin.write((json.dumps({"schema": value["schema"], "texts": texts_of(value)}) + "\n").encode())
        self.process.stdin.flush()
        end = time.monotonic() + seconds
        has_compiled = False
        while True:
            answer = self.line(end - time.monotonic())
            if answer is None:
                result["timed_out"] += 1
                if not has_compiled:
                    result["compiles"].append(seconds)
                self.stop()
                return
            result["refused"] += bool(answer.get("refused"))
            if "compile" in answer:
                has_compiled = True
                result["compiles"].append(answer["compile"])
            result["fills"] += answer.get("fills", [])
            result["rejected"] += bool(answer.get("rejected"))
            if answer.get("done"):
                return


def run_apus(options, values):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as sample:
        for value in values:
            sample.write(json.dumps(value) + "\n")
        sample.flush()
        done = subprocess.run(
            ["taskset", "-c", "0", options.apus, "bench", "grammar", "--json", "--tokenizer", options.tokenizer,
             "--schemas", sample.name], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit("apus failed: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return {"compile_us": result["compile_us"], "mask_us": result["mask_us"], "refused": result["refused"],
            "rejected": result["texts_rejected"], "timed_out": 0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apus", default=".build/release/apus")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--schemas")
    parser.add_argument("--limit", type=int, default=0, help="lines of the sample at most")
    parser.add_argument("--every", type=int, default=1, help="takes every Nth line")
    parser.add_argument("--seconds", type=float, default=10, help="for one schema, llguidance and xgrammar")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--state", help="keeps results, so that a run can go on")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further schema begins")
    parser.add_argument("--serve", choices=ENGINES[1:], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.tokenizer)
    if not options.schemas:
        parser.error("--schemas is required")
    begin = time.monotonic()
    with open(options.schemas) as file:
        values = [json.loads(line) for number, line in enumerate(file)
                  if line.strip() and number % options.every == options.every - 1]
    values = values[:options.limit or len(values)]
    state = {}
    if options.state and os.path.exists(options.state):
        with open(options.state) as file:
            state = json.load(file)
    for name in options.engines:
        if name == "apus":
            if name not in state:
                state[name] = run_apus(options, values)
            continue
        result = state.setdefault(
            name, {"next": 0, "compiles": [], "fills": [], "refused": 0, "rejected": 0, "timed_out": 0})
        worker = Worker(name, options.tokenizer)
        while result["next"] < len(values) and time.monotonic() - begin + options.seconds < options.budget:
            worker.measure(values[result["next"]], options.seconds, result)
            result["next"] += 1
        worker.stop()
    if options.state:
        with open(options.state, "w") as file:
            json.dump(state, file)

    print(f"{'':12}{'schemas':>8}{'refused':>8}{'over time':>10}{'rejected':>9}{'compile p50':>13}{'p99':>11}"
          f"{'mask p50':>11}{'p99':>11}{'max':>11}")
    rows = {}
    for name in [name for name in ENGINES if name in state]:
        result = state[name]
        compiles = result.get("compile_us") or summary(result["compiles"])
        fills = result.get("mask_us") or summary(result["fills"])
        rows[name] = [compiles["median"], compiles["p99"], fills["median"], fills["p99"], fills["max"]]
        print(f"{name:12}{result.get('next', len(values)):>8}{result['refused']:>8}{result['timed_out']:>10}"
              f"{result['rejected']:>9}{rows[name][0]:>13.1f}" + "".join(f"{v:>11.1f}" for v in rows[name][1:]))
    for name, row in rows.items():
        if name != "apus" and "apus" in rows:
            ratios = [other / own if own else float("nan") for other, own in zip(row, rows["apus"])]
            print(f"{name + ' / apus':47}{ratios[0]:>13.2f}" + "".join(f"{v:>11.2f}" for v in ratios[1:]))


if __name__ == "__main__":
    main()
