#!/usr/bin/env python3
"""Measures Apus beside llama.cpp and OpenVINO GenAI on the same shapes, in turns, and prints ratios with their spread.

  Scripts/bench_peers.py [--rounds 5] [--formats bf16,int8,int4] [--engines apus,llama,openvino]
  Scripts/bench_peers.py --serving 16 ...          16 clients at once, 256 tokens in and 128 out each
      --shared 192                                 the same, 192 of the 256 tokens shared: a first and a later wave
      --prompt-tokens 1088 --shared 1024 --waves 1 a long shared beginning that nobody has computed yet
  Scripts/bench_peers.py --report FILE...          tables of results that earlier runs kept with --output

A machine that others use changes its speed by tens of percent from hour to hour, so that only engines measured in turns can
be compared: in each round every engine measures once, in an order that turns around from round to round; a ratio is of two
engines in one round, and what is printed is the median over rounds with the smallest and the largest.

Peers lie in a directory (--peers, or APUS_PEERS; default ~/apus-peers):
  llama.cpp       build/llama/bin/{llama-bench,llama-batched-bench,llama-server}: its tools, for instance from the source that
                  the PyPI package llama-cpp-python brings (vendor/llama.cpp; cmake -DGGML_NATIVE=ON)
  OpenVINO        ov/bin/python: a virtual environment with openvino, openvino-genai and openvino-tokenizers
  models/NAME/    hf/ (safetensors in bfloat16), bf16.gguf, q8_0.gguf, q4_0.gguf, ov-fp16/, ov-int8/, ov-int4/: one model in
                  every engine's format; llama.cpp's converter and quantizer and optimum-intel make them. Weights may be random.

What is compared: bf16 with llama.cpp's BF16 and OpenVINO's fp16 file (which computes in the precision that it finds best for
the processor); int8 with Q8_0 and OpenVINO int8; int4 with Q4_0 and OpenVINO int4. Decoding: each sequence holds 512 tokens.
The peers' sequences share their prompt, which is computed once (llama-batched-bench -pps, OpenVINO's prefix cache), so that
their K/V is read from caches at times; Apus reads K/V of each sequence's own. K/V: Apus bfloat16, llama.cpp float16, OpenVINO
its default.
"""
import argparse
import asyncio
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = {"bf16": ("bf16.gguf", "ov-fp16"), "int8": ("q8_0.gguf", "ov-int8"), "int4": ("q4_0.gguf", "ov-int4")}
PORT = 18090
OUTPUT = 128  # tokens that every client of a server asks for


def tokens(count, seed):
    """Token ids that every tokenizer of the models has."""
    draw = random.Random(seed)
    return [draw.randrange(300, 20000) for _ in range(count)]


def output_of(command, limit, **more):
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit, **more)
    if run.returncode != 0:
        raise SystemExit(f"{command[0]} failed ({run.returncode}):\n{run.stderr[-2000:]}")
    return run.stdout


class Apus:
    def __init__(self, options):
        self.options = options
        self.program = options.apus
        if not os.access(self.program, os.X_OK):
            raise SystemExit(f"{self.program} is not there: build it with 'swift build -c release --product apus'.")

    def flags(self, format):
        flags = [str(self.options.model / "hf"), "--threads", str(self.options.threads), "--chunked-prefill-size", "512"]
        if self.options.packed_cache:
            flags += ["--packed-cache", self.options.packed_cache]
        return flags + ([] if format == "bf16" else ["--quantization", format])

    def measure(self, format, prompts, batches):
        command = [self.program, "bench", "throughput", *self.flags(format), "--context", "512", "--samples", "3",
                   "--sample-ms", "700", "--json", "-", "--quiet"]
        for prompt in prompts:
            command += ["--prompt", str(prompt)]
        for batch in batches:
            command += ["--batch", str(batch)]
        results = json.loads(output_of(command, 600))["results"]
        found = {}
        for result in results:
            shape = result["shape"]
            # The first sample touches memory for the first time; the peers warm up as well.
            value = statistics.median(result["samples"][1:])
            found[f"prefill {shape['prompt']}" if "prompt" in shape else f"decode {shape['batch']}"] = value
        return found

    def server(self, format):
        return [self.program, "serve", *self.flags(format), "--port", str(PORT), "--log-level", "warning"], "/ready"


class Llama:
    def __init__(self, options):
        self.options = options
        self.folder = options.peers / "build/llama/bin"
        need(self.folder / "llama-batched-bench", "llama.cpp")

    def measure(self, format, prompts, batches):
        file = str(self.options.model / FILES[format][0])
        threads = str(self.options.threads)
        found = {}
        for prompt in prompts:
            lines = output_of(
                [str(self.folder / "llama-bench"), "-m", file, "-t", threads, "-p", str(prompt), "-n", "0", "-r", "1",
                 "-o", "jsonl", *(["--no-warmup"] if prompt > 1000 else [])], 600)
            found[f"prefill {prompt}"] = json.loads(lines.splitlines()[-1])["avg_ts"]
        if not batches:
            return found
        lines = output_of(
            [str(self.folder / "llama-batched-bench"), "-m", file, "-t", threads, "-tb", threads,
             "-c", str(560 * max(batches)), "-b", "2048", "-ub", "512", "-npp", "512", "-ntg", "24", "-npl",
             ",".join(map(str, batches)), "-pps", "--output-format", "jsonl"], 600)
        for line in lines.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                found[f"decode {row['pl']}"] = row["speed_tg"]
        return found

    def server(self, format):
        need(self.folder / "llama-server", "llama.cpp")
        threads, clients = str(self.options.threads), self.options.serving
        return [str(self.folder / "llama-server"), "-m", str(self.options.model / FILES[format][0]), "-t", threads, "-tb",
                threads, "-np", str(clients), "-c", str(clients * (self.options.prompt_tokens + OUTPUT + 32)), "-b", "2048", "-ub", "512",
                "--host", "127.0.0.1", "--port", str(PORT)], "/health"


class OpenVINO:
    def __init__(self, options):
        self.options = options
        self.python = options.peers / "ov/bin/python"
        need(self.python, "OpenVINO")

    def child(self, format, *rest):
        text = output_of(
            [str(self.python), __file__, "--child", str(self.options.model / FILES[format][1]), "--threads",
             str(self.options.threads), *rest], 900)
        return json.loads(text.splitlines()[-1])

    def measure(self, format, prompts, batches):
        return self.child(
            format, "--prompts", ",".join(map(str, prompts)), "--batches", ",".join(map(str, batches)))

    def serve(self, format, clients, shared):
        return self.child(format, "--serving", str(clients), "--shared", str(shared), "--waves", str(self.options.waves),
                          "--prompt-tokens", str(self.options.prompt_tokens))


def need(path, name):
    if not path.exists():
        raise SystemExit(
            f"{path} is not there, which {name} is measured with. Install the peers as 'Scripts/bench_peers.py --help' says, name "
            "their directory with --peers or APUS_PEERS, or leave the engine out with --engines.")


ENGINES = {"apus": Apus, "llama": Llama, "openvino": OpenVINO}


# OpenVINO runs in a process of its own, in its own virtual environment.

def openvino_pipeline(folder, threads, caches):
    import openvino_genai as genai
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 1, 512, 64
    scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = caches, True
    return genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads})


def openvino_run(pipeline, prompts, length):
    """Times of first tokens, [(seconds, tokens)] of the steps in which nobody computes a prompt, seconds in all."""
    import numpy
    import openvino
    import openvino_genai as genai
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos, settings.do_sample = length, True, False
    begin = time.perf_counter()
    handles = [pipeline.add_request(number, openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)), settings)
               for number, prompt in enumerate(prompts)]
    first, steps, gaps = [None] * len(handles), [], []
    last = [None] * len(handles)
    while pipeline.has_non_finished_requests():
        all_started = all(time is not None for time in first)
        start = time.perf_counter()
        pipeline.step()
        end, count = time.perf_counter(), 0
        for number, handle in enumerate(handles):
            while handle.can_read():
                count += sum(len(result.generated_ids) for result in handle.read().values())
                if first[number] is None:
                    first[number] = end - begin
                else:
                    gaps.append(end - last[number])
                last[number] = end
        if all_started:
            steps.append((end - start, count))
    return first, steps, time.perf_counter() - begin, gaps


def child(options):
    found = {}
    if options.serving:
        pipeline = openvino_pipeline(options.child, options.threads, True)
        openvino_run(pipeline, [tokens(32, 1)], 4)
        waves = []
        for prompts in waves_of(options):
            first, _, seconds, gaps = openvino_run(pipeline, prompts, OUTPUT)
            waves.append(summary(options.serving * OUTPUT / seconds, first, gaps, OUTPUT))
        found = waves
    else:
        pipeline = openvino_pipeline(options.child, options.threads, True)
        openvino_run(pipeline, [tokens(64, 0)], 4)
        for prompt in numbers(options.prompts):
            first, _, _, _ = openvino_run(pipeline, [tokens(prompt, prompt)], 1)
            found[f"prefill {prompt}"] = prompt / first[0]
        prompt = tokens(512, 3)
        openvino_run(pipeline, [prompt], 1)
        for batch in numbers(options.batches):
            # Requests that share a cached prompt all begin in the first step.
            _, steps, _, _ = openvino_run(pipeline, [prompt] * batch, 26)
            times = [seconds for seconds, count in steps if count == batch]
            found[f"decode {batch}"] = batch / statistics.median(times)
    print(json.dumps(found))


# Serving.

def waves_of(options):
    """One wave of distinct prompts, or waves that share the beginning: a first and a later one."""
    length = options.prompt_tokens
    if not options.shared:
        return [[tokens(length, 1000 + client) for client in range(options.serving)]]
    beginning = tokens(options.shared, 5)
    return [[beginning + tokens(length - options.shared, 2000 + 100 * wave + client) for client in range(options.serving)]
            for wave in range(options.waves)]


def summary(rate, first, gaps, length):
    events = (len(first) + len(gaps)) / (len(first) * length)
    first, gaps = sorted(first), sorted(gaps) or [0]
    # A server that holds text back sends fewer events than tokens.
    return {"tokens/s": rate, "events": events, "ttft_p50": statistics.median(first), "ttft_max": first[-1],
            "itl_p50": statistics.median(gaps), "itl_p99": gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]}


async def client(model, prompt, length, begin, first, gaps):
    # Random weights write bytes that are no whole characters, which servers hold back: with log-probabilities Apus sends an
    # event for every token. llama-server ignores a 0 here, and computing more would slow it down.
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True,
                       "stream": True, "logprobs": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 22)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await writer.drain()
    last = None
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            if last is None:
                first.append(now - begin)
            else:
                gaps.append(now - last)
            last = now
    writer.close()


def serve(engine, options, format):
    if isinstance(engine, OpenVINO):
        return engine.serve(format, options.serving, options.shared)
    command, ready = engine.server(format)
    with open(os.devnull, "w") as nowhere:
        server = subprocess.Popen(command, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        limit = time.time() + 120
        while True:
            try:
                if urllib.request.urlopen(f"http://127.0.0.1:{PORT}{ready}", timeout=1).status == 200:
                    break
            except OSError:
                if server.poll() is not None or time.time() > limit:
                    raise SystemExit(f"{command[0]} does not start; run it by hand: {' '.join(command)}")
                time.sleep(0.05)
        model = json.load(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models", timeout=5))["data"][0]["id"]

        async def wave(prompts, length):
            first, gaps, begin = [], [], time.perf_counter()
            await asyncio.gather(*(client(model, prompt, length, begin, first, gaps) for prompt in prompts))
            if len(first) != len(prompts):
                raise SystemExit(f"{command[0]} answered {len(first)} of {len(prompts)} requests")
            return summary(len(prompts) * length / (time.perf_counter() - begin), first, gaps, length)

        asyncio.run(wave([tokens(32, 1)], 4))
        return [asyncio.run(wave(prompts, OUTPUT)) for prompts in waves_of(options)]
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


# Results.

def numbers(text):
    return [int(part) for part in text.split(",") if part]


def spread(values, digits):
    values = sorted(values)
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"


def report(rows):
    """Tables: tokens per second of each engine, and ratios of Apus by each peer, round by round."""
    cells, engines = {}, []
    for row in rows:
        cells.setdefault((row["format"], row["cell"]), {}).setdefault(row["round"], {})[row["engine"]] = row
        if row["engine"] not in engines:
            engines.append(row["engine"])
    engines.sort(key=list(ENGINES).index)
    peers = [name for name in engines if name != "apus"]
    head = ["format", "measured"] + [f"{name} tok/s" for name in engines] + [f"apus / {name}" for name in peers] + ["rounds"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for (format, cell), rounds in cells.items():
        line = [format, cell]
        for name in engines:
            values = [engine[name]["value"] for engine in rounds.values() if name in engine]
            line.append(spread(values, 1) if values else "-")
        for name in peers:
            ratios = [e["apus"]["value"] / e[name]["value"] for e in rounds.values() if name in e and "apus" in e]
            line.append(spread(ratios, 2) if ratios else "-")
        print("| " + " | ".join(line + [str(len(rounds))]) + " |")
    if any("ttft_p50" in row for row in rows):
        print("\n| format | measured | engine | TTFT p50 s | TTFT max s | ITL p50 ms | ITL p99 ms | events / tokens |\n"
              "|---|---|---|---|---|---|---|---|")
        for (format, cell), rounds in cells.items():
            for name in engines:
                own = [e[name] for e in rounds.values() if name in e and "ttft_p50" in e[name]]
                if own:
                    values = [(key, factor) for key, factor in
                              (("ttft_p50", 1), ("ttft_max", 1), ("itl_p50", 1000), ("itl_p99", 1000), ("events", 1))]
                    print(f"| {format} | {cell} | {name} | " + " | ".join(
                        f"{statistics.median(row[key] for row in own) * factor:.2f}" for key, factor in values) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=pathlib.Path, default=os.environ.get("APUS_PEERS", pathlib.Path.home() / "apus-peers"),
                        help="where the peers and models lie")
    parser.add_argument("--apus", default=str(ROOT / ".build/release/apus"), help="the program")
    parser.add_argument("--model", default="qwen2.5-0.5b", help="the model's folder in PEERS/models")
    parser.add_argument("--engines", default="apus,llama,openvino")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-round", type=int, default=0, help="the first round's number, for runs in pieces")
    parser.add_argument("--prompts", default="512,2048", help="lengths of prompts; empty for none")
    parser.add_argument("--batches", default="1,16,32", help="sequences that decode; empty for none")
    parser.add_argument("--serving", type=int, default=0, metavar="CLIENTS", help="measures servers instead")
    parser.add_argument("--shared", type=int, default=0, help="tokens that the clients' prompts share")
    parser.add_argument("--waves", type=int, choices=(1, 2), default=2, help="with --shared: 1 leaves the later wave out")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of each client's prompt")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--packed-cache", default="", help="where Apus keeps packed weights, which shortens its starts")
    parser.add_argument("--output", help="adds results to a file, one JSON object a line")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="prints the tables of earlier results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    if options.report:
        return report([json.loads(line) for file in options.report for line in open(file)])
    if options.shared >= options.prompt_tokens:
        parser.error("--shared has to be smaller than --prompt-tokens: each prompt ends with tokens of its own")
    options.peers = pathlib.Path(options.peers)
    options.model = options.peers / "models" / options.model
    engines = {name: ENGINES[name](options) for name in options.engines.split(",")}
    rows = []
    for number in range(options.first_round, options.first_round + options.rounds):
        for format in options.formats.split(","):
            order = list(engines.items())
            for name, engine in order[::-1] if number % 2 else order:
                if options.serving:
                    kinds = ["distinct"]
                    if options.shared:
                        kinds = [f"{options.shared} of {options.prompt_tokens} tokens shared, {which} wave"
                                 for which in ("first", "later")[:options.waves]]
                    found = [(f"{options.serving} clients, {kind}", wave["tokens/s"], wave) for kind, wave in
                             zip(kinds, serve(engine, options, format))]
                else:
                    found = [(cell, value, {}) for cell, value in
                             engine.measure(format, numbers(options.prompts), numbers(options.batches)).items()]
                for cell, value, more in found:
                    row = {"round": number, "format": format, "engine": name, "cell": cell, "value": value, **more}
                    rows.append(row)
                    print(f"round {number} {format:5} {name:9} {cell:28} {value:8.1f} tokens/s", file=sys.stderr)
                    if options.output:
                        with open(options.output, "a") as file:
                            file.write(json.dumps(row) + "\n")
    report(rows)


if __name__ == "__main__":
    main()
