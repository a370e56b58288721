#!/usr/bin/env python3
"""Checks the embeddings of a running Apus server with the official OpenAI client.

    python3 -m venv .venv && .venv/bin/pip install openai
    apus serve DIRECTORY --is-embedding --port 8000
    .venv/bin/python Scripts/embedding_client_check.py http://127.0.0.1:8000/v1 [--api-key KEY]

With --model-directory DIRECTORY, which holds a sentence-transformers encoder such as all-MiniLM-L6-v2, the vectors are
compared with Hugging Face transformers' (needs torch, transformers and numpy). --speed measures tokens per second, too.
Prints one line per check and exits with 0 if all of them passed, else with 1.
"""

import json
import math
import pathlib
import sys
import time
import urllib.request

import openai

import client_check
from client_check import Skip, check

TEXTS = [
  "That is a happy person", "That is a very happy dog", "Today is a sunny day", "x", "Ça alors, l'été à Zürich!", "東京は日本の首都です。",
  "The quick brown fox jumps over the lazy dog. " * 12, "def f(x):\n  return x ** 2  # a comment",
]


class Subject:
  """The server under test, and the vectors of the texts."""

  def __init__(self, url, key, options):
    self.url = url
    self.key = key
    self.options = options
    self.client = openai.OpenAI(base_url=url, api_key=key or "none", max_retries=0, timeout=600)
    self.model = self.client.models.list().data[0].id
    self.answer = self.embed(TEXTS)
    self.vectors = [item.embedding for item in self.answer.data]

  def embed(self, input, **fields):
    return self.client.embeddings.create(model=self.model, input=input, **fields)

  def post(self, path, body):
    request = urllib.request.Request(
      self.url + path, json.dumps(body).encode(),
      {"Content-Type": "application/json", "Authorization": f"Bearer {self.key or 'none'}"})
    with urllib.request.urlopen(request, timeout=600) as answer:
      return json.load(answer)


def add_arguments(parser):
  parser.add_argument("--model-directory", help="the encoder that is served, to compare its vectors")
  parser.add_argument("--speed", action="store_true", help="also measures tokens per second")


def close(left, right, tolerance):
  return len(left) == len(right) and all(abs(a - b) <= tolerance for a, b in zip(left, right))


def dot(left, right):
  return math.fsum(a * b for a, b in zip(left, right))


@check
def vectors_come_in_order(s):
  assert [item.index for item in s.answer.data] == list(range(len(TEXTS)))
  assert len({tuple(vector) for vector in s.vectors}) == len(TEXTS)
  assert s.answer.usage.prompt_tokens == s.answer.usage.total_tokens > len(TEXTS), s.answer.usage


@check
def vectors_have_length_one(s):
  for vector in s.vectors:
    assert abs(dot(vector, vector) - 1) < 1e-4, dot(vector, vector)


@check
def floats_equal_base64(s):
  # The client asks for base 64 by itself and decodes it. Both spell the same float32.
  plain = s.embed(TEXTS, encoding_format="float")
  assert all(close(item.embedding, vector, 1e-7) for item, vector in zip(plain.data, s.vectors))


@check
def a_text_alone_has_the_same_bits(s):
  for text, vector in zip(TEXTS, s.vectors):
    assert s.embed(text).data[0].embedding == vector, text


@check
def dimensions_cut_and_normalise(s):
  for item, vector in zip(s.embed(TEXTS, dimensions=16).data, s.vectors):
    length = math.sqrt(dot(vector[:16], vector[:16]))
    assert close(item.embedding, [value / length for value in vector[:16]], 1e-6)


@check
def bad_values_are_bad_requests(s):
  def bad(parameter, **fields):
    try:
      s.embed(**fields)
    except openai.BadRequestError as error:
      assert error.param == parameter and error.body["message"], error.body
      return
    raise AssertionError(f"{parameter} was taken")

  bad("input", input="")
  bad("input", input=[])
  bad("dimensions", input="a", dimensions=1 << 20)
  bad("input", input="word " * 20000)
  bad("input", input=["a"] * 2049)


@check
def a_wrong_key_is_unauthorized(s):
  if not s.key:
    raise Skip("no --api-key given")
  try:
    openai.OpenAI(base_url=s.url, api_key=s.key + "x", max_retries=0).embeddings.create(model=s.model, input="a")
  except openai.AuthenticationError:
    return
  raise AssertionError("a wrong key was taken")


@check
def scores_are_cosines(s):
  scores = [item["score"] for item in s.post("/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]})["data"]]
  assert close(scores, [dot(s.vectors[0], vector) for vector in s.vectors[1:]], 1e-5), scores


@check
def rerank_sorts_by_score(s):
  ranked = s.post("/rerank", {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 3})["results"]
  scores = [item["score"] for item in s.post("/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]})["data"]]
  order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:3]
  assert [item["index"] for item in ranked] == order, (ranked, scores)


@check
def vectors_equal_those_of_transformers(s):
  if not s.options.model_directory:
    raise Skip("no --model-directory given")
  import numpy as np
  import torch
  import transformers

  # As sentence-transformers computes them: each text alone, so that there is no padding.
  directory = pathlib.Path(s.options.model_directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval().float()
  pooling = json.loads((directory / "1_Pooling" / "config.json").read_text())
  largest = 0
  for text, vector in zip(TEXTS, s.vectors):
    ids = torch.tensor([tokenizer(text, padding=False, truncation=False)["input_ids"]])
    with torch.no_grad():
      hidden = model(ids).last_hidden_state[0]
    wanted = hidden.mean(0) if pooling.get("pooling_mode_mean_tokens") else hidden[0]
    wanted = (wanted / wanted.norm()).numpy()
    largest = max(largest, float(np.abs(np.array(vector, dtype=np.float32) - wanted).max()))
  print(f"      largest difference {largest:.2e}")
  assert largest < 1e-5, largest


@check
def speed(s):
  if not s.options.speed:
    raise Skip("no --speed given")
  for words, count in [(12, 1024), (200, 128)]:
    texts = [" ".join(f"word{(i * 7 + j) % 97}" if j % 5 == 0 else "time" for j in range(words // 2)) for i in range(count)]
    begin = time.perf_counter()
    used = s.embed(texts).usage.prompt_tokens
    seconds = time.perf_counter() - begin
    print(f"      {count} texts of {used / count:.0f} tokens: {used / seconds:.0f} tokens/s, {count / seconds:.0f} texts/s")


if __name__ == "__main__":
  sys.exit(
    client_check.main(__doc__, f"openai {openai.__version__} embeddings", Subject, "http://127.0.0.1:8000/v1", add_arguments))
