#!/usr/bin/env python3
"""Checks the embeddings of a running Apus server with the official OpenAI client, and compares its vectors with
Hugging Face transformers.

    python3 -m venv .venv && .venv/bin/pip install openai numpy torch transformers
    apus serve DIRECTORY --port 8000
    .venv/bin/python Scripts/embedding_client_check.py http://127.0.0.1:8000/v1 --model-directory DIRECTORY

DIRECTORY holds a sentence-transformers encoder such as all-MiniLM-L6-v2. Prints one line per check and exits with 0 if all
passed, else with 1. Without --model-directory nothing is compared.
"""

import argparse
import json
import pathlib
import sys
import time
import urllib.request

import numpy as np
import openai

TEXTS = [
  "That is a happy person", "That is a very happy dog", "Today is a sunny day", "x", "Ça alors, l'été à Zürich!", "東京は日本の首都です。",
  "The quick brown fox jumps over the lazy dog. " * 12, "def f(x):\n  return x ** 2  # a comment",
]


def reference(directory, texts):
  """Vectors as sentence-transformers computes them: each text alone, so that there is no padding."""
  import torch
  import transformers

  directory = pathlib.Path(directory)
  tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
  model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval().float()
  pooling = json.loads((directory / "1_Pooling" / "config.json").read_text())
  vectors = []
  for text in texts:
    ids = torch.tensor([tokenizer(text, padding=False, truncation=False)["input_ids"]])
    with torch.no_grad():
      hidden = model(ids).last_hidden_state[0]
    vector = hidden.mean(0) if pooling.get("pooling_mode_mean_tokens") else hidden[0]
    vectors.append((vector / vector.norm()).numpy())
  return np.stack(vectors)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("url")
  parser.add_argument("--model-directory")
  parser.add_argument("--api-key", default="none")
  parser.add_argument("--speed", action="store_true", help="also measures tokens per second")
  options = parser.parse_args()
  client = openai.OpenAI(base_url=options.url, api_key=options.api_key, max_retries=0, timeout=600)
  model = client.models.list().data[0].id
  failures = 0

  def check(name, is_right, note=""):
    nonlocal failures
    failures += not is_right
    print("ok  " if is_right else "FAIL", name, note)

  def post(path, body):
    request = urllib.request.Request(
      options.url + path, json.dumps(body).encode(),
      {"Content-Type": "application/json", "Authorization": "Bearer " + options.api_key})
    with urllib.request.urlopen(request, timeout=600) as answer:
      return json.load(answer)

  # The client asks for base 64 by itself and decodes it.
  answer = client.embeddings.create(model=model, input=TEXTS)
  vectors = np.array([item.embedding for item in answer.data], dtype=np.float32)
  check("one vector for each text, in order", [item.index for item in answer.data] == list(range(len(TEXTS))))
  check("vectors of length one", np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5))
  check("usage", answer.usage.prompt_tokens == answer.usage.total_tokens > len(TEXTS))

  plain = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
  check("float and base64 are equal", np.array_equal(np.array([d.embedding for d in plain.data], np.float32), vectors))
  alone = [client.embeddings.create(model=model, input=text).data[0].embedding for text in TEXTS]
  check("a text alone has the same bits", np.array_equal(np.array(alone, dtype=np.float32), vectors))

  short = client.embeddings.create(model=model, input=TEXTS, dimensions=16)
  cut = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
  check("dimensions cuts and normalises", np.allclose([d.embedding for d in short.data], cut, atol=1e-6))

  for name, body in [
    ("an empty text", {"input": ""}), ("no text", {"input": []}), ("too many dimensions", {"input": "a", "dimensions": 1 << 20}),
    ("a text that is too long", {"input": "word " * 20000}), ("too many texts", {"input": ["a"] * 2049}),
  ]:
    try:
      client.embeddings.create(model=model, **body)
      check(name + " is refused", False)
    except openai.BadRequestError as error:
      check(name + " is refused", True, str(error.body.get("message", ""))[:90])

  cosines = [float(vectors[0] @ vector) for vector in vectors[1:]]
  scores = [item["score"] for item in post("/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]})["data"]]
  check("scores are cosines", np.allclose(scores, cosines, atol=1e-6))
  ranked = post("/rerank", {"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 3})["results"]
  order = sorted(range(len(cosines)), key=lambda index: -cosines[index])[:3]
  check("rerank sorts by score", [item["index"] for item in ranked] == order)

  if options.model_directory:
    wanted = reference(options.model_directory, TEXTS)
    difference = float(np.abs(vectors - wanted).max())
    check("vectors equal transformers'", difference < 1e-5, f"largest difference {difference:.2e}")

  if options.speed:
    for words, count in [(12, 1024), (200, 128)]:
      texts = [" ".join(f"word{(i * 7 + j) % 97}" if j % 5 == 0 else "time" for j in range(words // 2)) for i in range(count)]
      begin = time.perf_counter()
      used = client.embeddings.create(model=model, input=texts).usage.prompt_tokens
      seconds = time.perf_counter() - begin
      print(f"     {count} texts of {used / count:.0f} tokens: {used / seconds:.0f} tokens/s, {count / seconds:.0f} texts/s")
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
