#!/usr/bin/env python3
"""Checks a running Apus server with the official Ollama client.

    python3 -m venv .venv && .venv/bin/pip install ollama
    .venv/bin/python Scripts/ollama_client_check.py http://127.0.0.1:8000 [--api-key KEY]

Runs chat and generate, whole and streamed, constrained answers, a conversation with a tool loop, what is known of models,
and errors. Prints one line per check and exits with 0 if all of them passed, else with 1. What the served model gives
nothing to check of is skipped; the wrong key is tried only if --api-key is given.
"""

import importlib.metadata
import json
import sys

import ollama

import client_check
from client_check import Skip, check


def get_weather(city: str) -> str:
  """The weather in a city.

  Args:
    city: the city's name
  """
  return "snow, -3 degrees"


HELLO = [{"role": "user", "content": "Hello"}]
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}


class Subject:
  """The server under test."""

  def __init__(self, url, key):
    self.url = url
    self.key = key
    self.client = self.make_client(key)
    self.model = self.client.list().models[0].model

  def make_client(self, key):
    return ollama.Client(host=self.url, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=120)

  def options(self, options):
    return {"temperature": 0, "num_predict": 24, **options}

  def chat(self, messages=HELLO, options={}, **fields):
    try:
      return self.client.chat(model=self.model, messages=messages, options=self.options(options), **fields)
    except ollama.ResponseError as error:
      if "does not support tools" in error.error or "template" in error.error:
        raise Skip(error.error) from error
      raise

  def generate(self, prompt="Once upon a time", options={}, **fields):
    return self.client.generate(model=self.model, prompt=prompt, options=self.options(options), **fields)


def expect_error(status, text, call):
  """Runs a call that must raise the client's exception."""
  try:
    call()
  except ollama.ResponseError as error:
    assert error.status_code == status, f"status {error.status_code}, expected {status}"
    assert text in error.error, error.error
    return
  raise AssertionError("expected a ResponseError, but the call succeeded")


def check_end(answer):
  assert answer.done and answer.done_reason in ("stop", "length"), answer
  assert answer.prompt_eval_count > 0 and answer.eval_count > 0 and answer.load_duration == 0, answer
  assert answer.prompt_eval_duration > 0 and answer.eval_duration >= 0, answer
  assert answer.total_duration >= answer.prompt_eval_duration + answer.eval_duration, answer


@check
def chat(s):
  answer = s.chat()
  assert answer.model == s.model and answer.message.role == "assistant" and answer.message.content, answer
  assert answer.created_at, answer
  check_end(answer)


@check
def chat_stream_adds_up(s):
  whole = s.chat()
  parts = list(s.chat(stream=True))
  assert "".join(part.message.content for part in parts) == whole.message.content, (parts, whole)
  assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True], parts
  check_end(parts[-1])
  assert parts[-1].eval_count == whole.eval_count and parts[-1].done_reason == whole.done_reason, (parts[-1], whole)


@check
def generate(s):
  answer = s.generate()
  assert isinstance(answer.response, str), answer
  check_end(answer)


@check
def generate_stream_adds_up(s):
  whole = s.generate(system="Be brief.")
  parts = list(s.generate(system="Be brief.", stream=True))
  assert "".join(part.response for part in parts) == whole.response, (parts, whole)
  check_end(parts[-1])


@check
def generate_raw(s):
  raw = s.generate(raw=True)
  check_end(raw)
  assert raw.prompt_eval_count <= s.generate().prompt_eval_count, raw


@check
def options(s):
  assert s.chat(options={"num_predict": 1}).done_reason == "length"
  draws = {"temperature": 1, "seed": 7, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repeat_penalty": 1.1}
  assert s.chat(options=draws).message.content == s.chat(options=draws).message.content
  text = s.chat().message.content
  stop = text[len(text) // 2:][:2]
  assert s.chat(options={"stop": [stop]}).message.content == text[:text.index(stop)]


@check
def formats(s):
  free = s.chat(format="json", options={"num_predict": 200})
  assert free.message.content.lstrip().startswith("{"), free
  if free.done_reason == "stop":
    assert isinstance(json.loads(free.message.content), dict), free
  schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
  answer = s.chat([QUESTION], format=schema, options={"num_predict": 64})
  assert json.loads(answer.message.content)["city"] in ("Oslo", "Rome"), answer
  text = s.generate(QUESTION["content"], format=schema, options={"num_predict": 64}).response
  assert json.loads(text)["city"] in ("Oslo", "Rome"), text


@check
def tool_loop(s):
  """A conversation that goes on until the model calls nothing more: at most four turns."""
  messages = [QUESTION]
  calls = 0
  for _ in range(4):
    answer = s.chat(messages, tools=[get_weather], options={"num_predict": 64})
    messages.append(answer.message)
    for call in answer.message.tool_calls or []:
      assert call.function.name == "get_weather", call
      calls += 1
      arguments = dict(call.function.arguments)
      messages.append({"role": "tool", "tool_name": "get_weather", "content": get_weather(arguments.get("city", ""))})
    if not answer.message.tool_calls:
      break
  if calls == 0:
    raise Skip("the model called nothing")
  print("      the loop's last turn:", answer.message.model_dump(exclude_none=True))


@check
def streamed_calls_are_whole(s):
  whole = s.chat([QUESTION], tools=[get_weather], options={"num_predict": 64})
  parts = list(s.chat([QUESTION], tools=[get_weather], options={"num_predict": 64}, stream=True))
  calls = [call.function for part in parts for call in part.message.tool_calls or []]
  assert calls == [call.function for call in whole.message.tool_calls or []], (calls, whole)
  if not calls:
    raise Skip("the model called nothing")


@check
def thinking(s):
  messages = [{"role": "user", "content": "What is 23 plus 48?"}]
  try:
    answer = s.chat(messages, think=True, options={"num_predict": 400})
  except ollama.ResponseError as error:
    if "does not support thinking" in error.error:
      raise Skip(error.error) from error
    raise
  silent = s.chat(messages, think=False, options={"num_predict": 400})
  assert not silent.message.thinking, silent
  if not answer.message.thinking:
    raise Skip("the model did not think")
  assert "think>" not in answer.message.content, answer


@check
def loading(s):
  assert s.client.generate(model=s.model).done_reason == "load"
  assert s.client.chat(model=s.model, messages=[], keep_alive=0).done_reason == "unload"


@check
def what_is_known_of_models(s):
  listed = s.client.list().models[0]
  assert listed.model == s.model and listed.size > 0 and len(listed.digest) == 64 and listed.modified_at, listed
  assert listed.details.family and listed.details.parameter_size, listed
  running = s.client.ps().models[0]
  assert running.model == s.model and running.digest == listed.digest and running.context_length > 0, running
  assert running.expires_at, running
  for name in (s.model, s.model + ":latest"):
    shown = s.client.show(name)
    assert "completion" in shown.capabilities and shown.modelinfo["general.parameter_count"] > 0, shown


@check
def bad_values_are_errors(s):
  expect_error(400, "temperature", lambda: s.chat(options={"temperature": -1}))
  expect_error(400, "num_predict", lambda: s.chat(options={"num_predict": "many"}))
  expect_error(400, "suffix", lambda: s.generate(suffix="end"))
  expect_error(400, "template", lambda: s.generate(template="{{ .Prompt }}"))
  expect_error(400, "text only", lambda: s.chat([{"role": "user", "content": "x", "images": [b"0000"]}]))
  expect_error(404, "no-such-model", lambda: s.client.show("no-such-model"))
  expect_error(404, "no-such-model", lambda: s.client.generate(model="no-such-model", prompt="x"))


@check
def a_wrong_key_is_unauthorized(s):
  if not s.key:
    raise Skip("no --api-key given")
  expect_error(401, "key", lambda: s.make_client(s.key + "x").list())


if __name__ == "__main__":
  sys.exit(client_check.main(__doc__, f"ollama {importlib.metadata.version('ollama')}", Subject, "http://127.0.0.1:8000"))
