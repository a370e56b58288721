"""Trains a demo model on the generated corpus. It stops and goes on where it was, step for step.

    python train.py --config configs/apus-demo.json --tokenizer build/tokenizer --out build/apus-demo [--resume]

--warm-start ../Models/apus-demo begins from shipped weights instead of fresh ones.

Matrices of the layers are trained with Muon (momentum, then the nearest orthogonal matrix by Newton-Schulz steps;
Jordan et al., 2024), the embedding and the norms with AdamW. The learning rate warms up, stays, and at the end falls
to zero in a straight line. `log.jsonl` holds the loss curve. While the file named by --pause exists, training sleeps.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import chat
import corpus
from initialise import initialise
from model_moe import build
from upcycle import fit_loss, upcycle

CHUNK = 2000


def orthogonal(gradient: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """About the nearest orthogonal matrix to each of the stacked matrices: [count, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16() if gradient.is_cuda else gradient.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        y = x @ x.transpose(1, 2)
        x = a * x + (b * y + c * (y @ y)) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Muon over matrices, those of one shape worked out together. A stack of matrices is as many matrices."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float, decay: float, threads: int = 1,
                 faster: dict[torch.nn.Parameter, float] | None = None):
        """faster: by how much the rate of some parameters differs from that of the others."""
        self.momentum, self.decay, self.faster = momentum, decay, faster or {}
        self.groups: dict[tuple, list[tuple]] = {}
        for parameter in parameters:
            for index in range(len(parameter)) if parameter.ndim == 3 else [...]:
                self.groups.setdefault(tuple(parameter.shape[-2:]), []).append((parameter, index))
        # Matrices are worked out on as many threads as there are workers, several of a shape together.
        self.threads = ThreadPoolExecutor(threads)
        self.count = threads
        self.buffers = {shape: torch.zeros(len(group), *shape, device=group[0][0].device)
                        for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        pieces = []
        for shape, group in self.groups.items():
            size = max(1, min(-(-len(group) // self.count), 2**21 // (shape[0] * shape[1])))
            for first in range(0, len(group), size):
                pieces.append((shape, slice(first, first + size), rate))
        pieces.sort(key=lambda piece: -(piece[1].stop - piece[1].start) * piece[0][0] * piece[0][1])
        list(self.threads.map(self.update, pieces))

    @torch.no_grad()
    def update(self, piece: tuple) -> None:
        shape, members, rate = piece
        group = self.groups[shape][members]
        gradient = torch.stack([parameter.grad[index] for parameter, index in group])
        # Matrices that nothing used, such as experts without a token, rest: a fading momentum would move them all the same.
        used = gradient.flatten(1).any(1).nonzero().flatten().tolist()
        if len(used) < len(group):
            group, gradient = [group[at] for at in used], gradient[used]
            members = [range(*members.indices(len(self.buffers[shape])))[at] for at in used]
            if not used:
                return
        buffer = self.buffers[shape][members]
        buffer.lerp_(gradient, 1 - self.momentum)
        if isinstance(members, list):
            self.buffers[shape][members] = buffer
        update = orthogonal(gradient.lerp(buffer, self.momentum)).float()
        scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
        for at, (parameter, index) in enumerate(group):
            matrix, times = parameter.data[index], self.faster.get(parameter, 1.0)
            matrix.mul_(1 - times * rate * self.decay)
            matrix.sub_(update[at], alpha=times * scale)


def encode(tokenizer: Tokenizer, conversation: dict, prompt_weight: float) -> tuple[list[int], list[float]]:
    """Tokens and, for each, its weight in the loss as something to predict. Short answers weigh a little more."""
    tokens: list[int] = []
    weights: list[float] = []
    for text, learnt in chat.render(conversation):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        weight = max(1.0, min(3.0, 6.0 / len(ids))) if learnt else prompt_weight
        tokens += ids
        weights += [weight] * len(ids)
    return tokens, weights


def chunk(number: int, tokenizer_path: str, settings: dict) -> list[tuple]:
    """The micro-batches of chunk `number` of the corpus, in the order they are trained on.

    Conversations of about one length share a micro-batch, so little is padded and none sees another. Each entry is
    (tokens [batch, length], targets, weights, picked): the loss looks at the flat positions `picked`, all that the
    model should write and a random part of the rest.
    """
    tokenizer = Tokenizer.from_file(tokenizer_path)
    pad = tokenizer.token_to_id("<|endoftext|>")
    r = Random(f"{settings['seed']}/chunk/{number}")
    rows = []
    for index in range(number * CHUNK, (number + 1) * CHUNK):
        many = 0.15 if number < settings["many_turns_from_chunk"] else 0.3
        long = settings["long_share"] if number >= settings["long_from_chunk"] else 0.0
        conversation = corpus.training_conversation(
            index, many, long, early=number < settings["early_until_chunk"],
            drills=settings["drills_from_chunk"] <= number < settings["drills_until_chunk"])
        tokens, weights = encode(tokenizer, conversation, settings["prompt_weight"])
        if len(tokens) <= settings["longest"]:
            rows.append((tokens, weights))
    rows.sort(key=lambda row: len(row[0]))
    groups, at = [], len(rows)
    while at > 0:  # from the longest down, so that the last row of a group is its longest
        count = max(1, settings["tokens_per_micro_batch"] // len(rows[at - 1][0]))
        groups.append(rows[max(0, at - count): at])
        at -= count
    r.shuffle(groups)
    made = []
    for group in groups:
        length = len(group[-1][0])
        tokens = torch.full((len(group), length), pad, dtype=torch.long)
        weight = torch.zeros(len(group), length)
        for at, (ids, ws) in enumerate(group):
            tokens[at, : len(ids)] = torch.tensor(ids)
            weight[at, : len(ids) - 1] = torch.tensor(ws[1:])
        targets = torch.roll(tokens.flatten(), -1)
        flat = weight.flatten()
        coin = torch.rand(flat.numel(), generator=torch.Generator().manual_seed(r.getrandbits(40)))
        picked = ((flat >= 1) | ((flat > 0) & (coin < 0.2))).nonzero().flatten()
        made.append((tokens, targets[picked], flat[picked], picked))
    return made


class Supply:
    """Chunks of the corpus in order, made ahead: by a thread, or where the device is fast, by several processes."""

    def __init__(self, first: int, processes: int, tokenizer_path: str, settings: dict):
        self.pool = ProcessPoolExecutor(processes, torch.multiprocessing.get_context("spawn")) if processes > 1 else ThreadPoolExecutor(1)
        self.next, self.ahead = first, max(1, processes)
        self.tokenizer_path, self.settings = tokenizer_path, settings
        self.waiting: deque = deque()

    def take(self) -> list[tuple]:
        while len(self.waiting) <= self.ahead:
            self.waiting.append(self.pool.submit(chunk, self.next, self.tokenizer_path, self.settings))
            self.next += 1
        return self.waiting.popleft().result()


@cache
def short_floats(device: str) -> bool:
    """Whether products in bfloat16 are faster than in float32: on a GPU, and on a processor made for them."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def loss_of(model: torch.nn.Module, teacher: torch.nn.Module | None, piece: tuple, total: float, way: dict,
            device: str) -> torch.Tensor:
    """The share of a micro-batch in the mean loss of its step.

    way: how the step is trained. fit: attention on the teacher's activations, as one of so many micro-batches.
    teacher_share: how much of the loss is the divergence from the teacher. ahead: whether the MTP layer is trained.
    """
    tokens, targets, weights, picked = (part.to(device) for part in piece)
    dtype = torch.bfloat16 if short_floats(device) else torch.float32
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if not way:
            return model(tokens, targets, weights, picked, dtype) / total
        if way["fit"]:
            errors, hidden = fit_loss(model, teacher, tokens)
            where, keep = model.early(picked, tokens.shape[1])
            ahead = F.cross_entropy(model.head(model.model.ahead(tokens, hidden, where)), targets[keep], reduction="none")
            return errors.sum() / way["fit"] + (ahead * weights[keep]).sum() / total
        logits = None
        if way["teacher_share"] > 0:
            with torch.no_grad():
                hidden = teacher.model(tokens, dtype, picked)
                logits = F.linear(hidden, teacher.model.embed_tokens.weight.to(dtype)).float()
        return model(tokens, targets, weights, picked, dtype, logits, way["teacher_share"], way["ahead"]) / total


def work(model: torch.nn.Module, teacher: torch.nn.Module | None, gradients: torch.Tensor, jobs, results) -> None:
    """A worker process: adds the gradients of the micro-batches it draws to its own shared buffer."""
    torch.set_num_threads(1)
    for module in model.modules():
        if hasattr(module, "loads"):
            module.loads = torch.zeros_like(module.loads)  # its own count, not the shared one
    at = 0
    for parameter in model.parameters():
        parameter.grad = gradients[at: at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    while True:
        job = jobs.get()
        if job is None:
            return
        loss = loss_of(model, teacher, *job, "cpu")
        loss.backward()
        results.put((loss.item(), model.take_loads()))


def load_dense(folder: Path) -> torch.nn.Module:
    """The dense model of a model folder, its weights as they are."""
    teacher = build(json.loads((folder / "config.json").read_text()))
    teacher.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return teacher.requires_grad_(False)


def ways(state: dict, settings: dict, count: int) -> list[dict]:
    """How each micro-batch of the next step is trained; nothing to say for a model without a teacher."""
    if "teacher" not in settings:
        return [{}] * count
    # Text takes the teacher's place by and by.
    left = 1 - state["step"] / settings["teacher_until_step"]
    share = settings["ahead_share"]
    return [{"fit": count if state["step"] < settings["fit_steps"] else 0,
             "teacher_share": max(0.0, settings["teacher_share"] * left),
             "ahead": int((index + 1) * share) > int(index * share)} for index in range(count)]


def rate_factor(step: int, settings: dict) -> float:
    warmup, steps = settings["warmup_steps"], settings["steps"]
    if "teacher" not in settings:
        return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / settings["decay_steps"]))
    # While layers are fitted the rate falls to what the whole can bear, and then from there to zero.
    fit, after = settings["fit_steps"], settings["rate_after_fit"]
    if step < fit:
        return min((step + 1) / warmup, 1 - (1 - after) * step / fit)
    return after * max(0.0, min(1.0, (steps - step) / settings["decay_steps"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--tokenizer", default="build/tokenizer")
    parser.add_argument("--out", required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--warm-start", metavar="FOLDER",
                        help="begin from the weights of a model folder, with a fresh optimizer")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2, help="processes that train, on a CPU")
    parser.add_argument("--readers", type=int, default=1, help="processes that make the corpus")
    parser.add_argument("--minutes-between-checkpoints", type=float, default=4)
    parser.add_argument("--finish-in", type=float, default=None, metavar="MINUTES",
                        help="let the rate fall from now on and end after so many minutes, whatever the step")
    parser.add_argument("--pause", help="while a file of this name exists, training sleeps")
    arguments = parser.parse_args()

    config = json.loads(Path(arguments.config).read_text())
    settings = config["training"]
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(Path(arguments.tokenizer) / "tokenizer.json"))
    pad = tokenizer.token_to_id("<|endoftext|>")
    assert config["model"]["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert config["model"]["pad_token_id"] == pad

    device = arguments.device
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    model = build(config["model"])
    teacher = load_dense(Path(__file__).parent / settings["teacher"]) if "teacher" in settings else None
    checkpoint = out / "checkpoint.pt"
    going_on = arguments.resume and checkpoint.exists()
    if arguments.warm_start:
        loaded = load_file(Path(arguments.warm_start) / "model.safetensors")
        model.load_checkpoint({name: value.float() for name, value in loaded.items()})
    elif teacher is not None and not going_on:
        torch.set_num_threads(max(1, arguments.workers))
        upcycle(model, teacher, tokenizer, settings["seed"])
        torch.set_num_threads(1)
    elif settings.get("structured_start"):
        initialise(model, tokenizer, settings["seed"])
    model.to(device)
    if teacher is not None:
        teacher.to(device)
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim > 1 and "embed" not in n and "mlp.gate.weight" not in n]
    routers = [p for n, p in named.items() if "mlp.gate.weight" in n]
    # The MTP layer begins with little, where the others have their teacher's skill to lose.
    last = f"model.layers.{config['model']['num_hidden_layers']}."
    muon = Muon(matrices, settings["momentum"], settings["weight_decay"], max(1, arguments.workers),
                {p: settings["ahead_rate_times"] for n, p in named.items() if n.startswith(last)})
    adam = torch.optim.AdamW([
        {"params": [p for n, p in named.items() if "embed" in n], "peak": settings["learning_rate_embedding"]},
        {"params": [p for n, p in named.items() if p.ndim == 1 and n != "model.norm.weight"],
         "peak": settings["learning_rate_norms"]},
        # The last norm is also the scale of the logits: it may begin small, and its steps must be as small.
        {"params": [named["model.norm.weight"]],
         "peak": settings["learning_rate_norms"] * named["model.norm.weight"].mean().item()},
        *([{"params": routers, "peak": settings["learning_rate_routers"]}] if routers else []),
    ], betas=(0.9, 0.98), weight_decay=0.0)
    state = {"step": 0, "chunk": settings.get("first_chunk", 0), "batch": 0, "tokens": 0, "seconds": 0.0}
    if going_on:
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        adam.load_state_dict(saved["adam"])
        for shape, buffer in saved["muon"].items():
            muon.buffers[shape].copy_(buffer)
        state = saved["state"]
        print(f"goes on at step {state['step']}", flush=True)

    def save() -> None:
        torch.save({"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buffers, "state": state},
                   out / "checkpoint.tmp")
        os.replace(out / "checkpoint.tmp", checkpoint)

    size = sum(parameter.numel() for parameter in model.parameters())
    alone = device != "cpu" or arguments.workers < 2
    workers: list = []
    if not alone:
        # Each worker draws small pieces of every step, so a processor that is busy elsewhere holds up little.
        model.share_memory()
        if teacher is not None:
            teacher.share_memory()
        processes = torch.multiprocessing.get_context("spawn")
        jobs, results = processes.SimpleQueue(), processes.SimpleQueue()
        gradients = torch.zeros(arguments.workers, size).share_memory_()
        workers = [processes.Process(target=work, args=(model, teacher, gradients[index], jobs, results), daemon=True)
                   for index in range(arguments.workers)]
        for process in workers:
            process.start()
    summed = torch.zeros(size, device=device)
    at = 0
    for parameter in model.parameters():
        parameter.grad = summed[at: at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    supply = Supply(state["chunk"], arguments.readers, str(Path(arguments.tokenizer) / "tokenizer.json"), settings)
    batches = supply.take()
    log = open(out / "log.jsonl", "a" if arguments.resume else "w", encoding="utf-8")
    began = saved_at = time.time()
    fell_to = state.get("factor", 1.0)
    asked_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    count = settings["micro_batches"]
    while state["step"] < settings["steps"] and not asked_to_stop:
        while arguments.pause and os.path.exists(arguments.pause) and not asked_to_stop:
            time.sleep(2)
        if asked_to_stop:
            break
        started = time.time()
        if state["batch"] + count > len(batches):
            state["chunk"] += 1
            state["batch"] = 0
            batches = supply.take()
        part = batches[state["batch"]: state["batch"] + count]
        total = float(sum(weights.sum() for _, _, weights, _ in part))
        state["tokens"] += sum(int((tokens != pad).sum()) for tokens, _, _, _ in part)
        if alone:
            summed.zero_()
            done = []
            for piece, way in zip(part, ways(state, settings, count)):
                value = loss_of(model, teacher, piece, total, way, device)
                value.backward()
                done.append((value.item(), model.take_loads()))
        else:
            for piece, way in zip(part, ways(state, settings, count)):
                jobs.put((piece, total, way))
            done = [results.get() for _ in part]
            torch.sum(gradients, 0, out=summed)
            gradients.zero_()
        loss = sum(value for value, _ in done)
        factor = rate_factor(state["step"], settings)
        if arguments.finish_in is not None:
            factor = min(factor, fell_to * (1 - (time.time() - began) / 60 / arguments.finish_in))
            if factor <= 0:
                break
        norm = torch.nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]], 1.0)
        fitting = teacher is not None and state["step"] < settings["fit_steps"]
        muon.step(settings["learning_rate_matrices"] * factor)
        for group in adam.param_groups:
            # While layers are fitted to the teacher's activations, the embedding and the last norm are the teacher's.
            held = fitting and (group["params"][0] is named["model.embed_tokens.weight"] or
                                group["params"][0] is named["model.norm.weight"])
            group["lr"] = 0.0 if held else group["peak"] * factor
        adam.step()
        if done[0][1] is not None:
            model.balance(torch.stack([loads for _, loads in done]).sum(0), settings["balance_speed"] * factor)
        state["batch"] += count
        state["step"] += 1
        state["factor"] = factor
        state["seconds"] += time.time() - started
        log.write(json.dumps({"step": state["step"], "loss": round(loss, 4), "tokens": state["tokens"],
                              "seconds": round(state["seconds"], 1), "rate": round(factor, 4)}) + "\n")
        log.flush()
        if state["step"] % 20 == 0:
            print(f"step {state['step']} loss {loss:.3f} tokens {state['tokens']} rate {factor:.3f} norm {norm:.2f} "
                  f"{state['tokens'] / state['seconds']:.0f} tokens/s", flush=True)
        if state["step"] == settings["steps"] - settings["decay_steps"]:
            # From here the rate falls. Training that goes on longer another day starts from this copy.
            save()
            shutil.copy(checkpoint, out / "before-decay.pt")
        if time.time() - saved_at > 60 * arguments.minutes_between_checkpoints:
            save()
            saved_at = time.time()
    save()
    log.close()
    for _ in workers:
        jobs.put(None)
    supply.pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    main()
