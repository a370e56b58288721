#!/usr/bin/env python3
"""Checks a running Apus server with the official Anthropic client.

    python3 -m venv .venv && .venv/bin/pip install anthropic
    .venv/bin/python Scripts/anthropic_client_check.py http://127.0.0.1:8000 [--api-key KEY]

Runs messages, streams, a conversation with a tool loop, token counts and the mapping of errors to the client's exception
types. Prints one line per check and exits with 0 if all of them passed, else with 1. What the served model's template or
skill gives nothing to check of is skipped; the wrong key is tried only if --api-key is given.
"""

import json
import sys

import anthropic

import client_check
from client_check import Skip, check


WEATHER = {
  "name": "get_weather", "description": "The weather in a city",
  "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}
FORCED = {"type": "tool", "name": "get_weather"}


class Subject:
  """The server under test."""

  def __init__(self, url, key):
    self.url = url
    self.key = key
    self.client = self.make_client(key)
    self.model = self.client.models.list().data[0].id

  def make_client(self, key):
    return anthropic.Anthropic(base_url=self.url, api_key=key or "none", max_retries=0, timeout=120)

  def fields(self, sampling={"temperature": 0}, **fields):
    # Newer versions of the client know no temperature, and what they do not know goes into extra_body.
    return {
      "model": self.model, "max_tokens": 24, "messages": [{"role": "user", "content": "Hello"}],
      "extra_body": sampling, **fields
    }

  def create(self, **fields):
    return self.client.messages.create(**self.fields(**fields))

  def stream(self, **fields):
    return self.client.messages.stream(**self.fields(**fields))


def expect_error(kind, status, type, call):
  """Runs a call that must raise the given exception of the client."""
  try:
    call()
  except kind as error:
    assert error.status_code == status, f"status {error.status_code}, expected {status}"
    assert error.body["type"] == "error" and error.body["error"]["type"] == type, error.body
    assert error.body["error"]["message"], error.body
    assert error.request_id, "no request id"
    return error.body["error"]["message"]
  raise AssertionError(f"expected {kind.__name__}, but the call succeeded")


def forced(s, **fields):
  """A message whose answer must hold a call; skipped where the model's template shows no format of calls."""
  try:
    return s.create(messages=[QUESTION], tools=[WEATHER], tool_choice=FORCED, max_tokens=64, **fields)
  except anthropic.BadRequestError as error:
    if "tool_choice" in str(error):
      raise Skip("the chat template shows no format of tool calls") from error
    raise


@check
def message(s):
  answer = s.create()
  assert answer.type == "message" and answer.role == "assistant" and answer.model == s.model and answer.id, answer
  assert [block.type for block in answer.content] == ["text"] and answer.content[0].text, answer
  assert answer.stop_reason in ("end_turn", "max_tokens") and answer.stop_sequence is None, answer
  assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 0, answer.usage
  assert answer.usage.output_tokens > 0, answer.usage


@check
def stream_adds_up_to_the_message(s):
  whole = s.create(system="Be brief.")
  with s.stream(system="Be brief.") as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
  assert text == "".join(block.text for block in whole.content if block.type == "text"), (text, whole)
  assert final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason, (final, whole)
  assert final.usage.output_tokens == whole.usage.output_tokens, (final.usage, whole.usage)


@check
def raw_events_come_in_order(s):
  events = [event.type for event in s.create(stream=True)]
  assert events[0] == "message_start" and events[-2:] == ["message_delta", "message_stop"], events
  assert events.count("content_block_start") == events.count("content_block_stop") > 0, events


@check
def blocks_and_system_blocks(s):
  blocks = s.create(
    system=[{"type": "text", "text": "Be brief."}],
    messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
  assert blocks.content == s.create(system="Be brief.").content, blocks


@check
def max_tokens_and_stop_sequences(s):
  cut = s.create(max_tokens=1)
  assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 1, cut
  text = s.create().content[0].text
  stop = text[len(text) // 2:][:2]
  stopped = s.create(stop_sequences=[stop])
  assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == stop, (stopped, stop)
  assert stopped.content[0].text == text[:text.index(stop)], (stopped, text)


@check
def sampling_fields(s):
  answer = s.create(
    sampling={"temperature": 0.7, "top_p": 0.9, "top_k": 5}, metadata={"user_id": "someone"}, max_tokens=4)
  assert 0 < answer.usage.output_tokens <= 4, answer.usage


@check
def the_last_answer_is_continued(s):
  answer = s.create(messages=[QUESTION, {"role": "assistant", "content": "The weather in Oslo"}], max_tokens=8)
  assert answer.role == "assistant", answer


@check
def tokens_are_counted(s):
  fields = {"model": s.model, "system": "Be brief.", "messages": [QUESTION], "tools": [WEATHER]}
  count = s.client.messages.count_tokens(**fields).input_tokens
  usage = s.create(**fields, max_tokens=1).usage
  assert count == usage.input_tokens + usage.cache_read_input_tokens, (count, usage)


@check
def forced_call(s):
  answer = forced(s)
  call = answer.content[-1]
  assert call.type == "tool_use" and call.name == "get_weather" and call.id.startswith("toolu_"), answer
  if answer.stop_reason == "tool_use":
    assert isinstance(call.input["city"], str), call


@check
def streamed_call_adds_up(s):
  whole = forced(s)
  text = ""
  with s.stream(messages=[QUESTION], tools=[WEATHER], tool_choice=FORCED, max_tokens=64) as stream:
    for event in stream:
      if event.type == "content_block_delta" and event.delta.type == "input_json_delta":
        text += event.delta.partial_json
    final = stream.get_final_message()
  assert final.stop_reason == whole.stop_reason, (final, whole)
  if whole.stop_reason == "tool_use":
    assert final.content[-1].input == whole.content[-1].input == json.loads(text), (final, whole, text)


@check
def tool_loop(s):
  """A conversation that goes on until the model calls nothing more: at most four turns, the first call forced."""
  messages = [QUESTION]
  choice = FORCED
  calls = 0
  for _ in range(4):
    try:
      answer = s.create(messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=64)
    except anthropic.BadRequestError as error:
      if "cannot force" in str(error):
        raise Skip("the chat template shows no format of tool calls") from error
      raise
    choice = {"type": "auto"}
    messages.append({"role": "assistant", "content": answer.content})
    results = [
      {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "snow, -3 degrees"}]}
      for block in answer.content if block.type == "tool_use"
    ]
    calls += len(results)
    if not results:
      break
    messages.append({"role": "user", "content": results})
  assert calls > 0, messages
  print("      the loop's last turn:", [block.to_dict() for block in answer.content])


@check
def tool_choice_none_gives_text(s):
  answer = s.create(messages=[QUESTION], tools=[WEATHER], tool_choice={"type": "none"})
  assert all(block.type != "tool_use" for block in answer.content), answer


@check
def thinking(s):
  question = {"role": "user", "content": "What is 23 plus 48?"}
  answer = s.create(messages=[question], thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1025)
  kinds = [block.type for block in answer.content]
  if "thinking" not in kinds:
    raise Skip("the model did not think")
  assert kinds[0] == "thinking", kinds
  again = s.create(
    messages=[
      question, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "Thank you"},
    ])
  assert again.role == "assistant", again


@check
def a_schema_is_kept(s):
  schema = {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
    "additionalProperties": False,
  }
  answer = s.create(
    messages=[QUESTION], max_tokens=64, output_config={"format": {"type": "json_schema", "schema": schema}})
  text = "".join(block.text for block in answer.content if block.type == "text")
  assert answer.stop_reason == "end_turn" and json.loads(text)["city"] in ("Oslo", "Rome"), answer


@check
def bad_values_are_bad_requests(s):
  def bad(text, **fields):
    said = expect_error(anthropic.BadRequestError, 400, "invalid_request_error", lambda: s.create(**fields))
    assert text in said, said

  bad("temperature", sampling={"temperature": -1})
  bad("max_tokens", max_tokens=0)
  bad("messages", messages=[])
  bad("messages[0].role", messages=[{"role": "system", "content": "x"}])
  bad("tool_choice", tool_choice={"type": "any"})
  bad("input_schema", tools=[{"name": "f"}])
  bad("budget_tokens", thinking={"type": "enabled", "budget_tokens": 5000})
  image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
  bad("image", messages=[{"role": "user", "content": [image]}])
  bad("", messages=[{"role": "user", "content": "word " * 100_000}])


@check
def an_unknown_model_is_not_found(s):
  expect_error(anthropic.NotFoundError, 404, "not_found_error", lambda: s.create(model="no-such-model"))


@check
def a_wrong_key_is_unauthorized(s):
  if not s.key:
    raise Skip("no --api-key given")
  wrong = s.make_client(s.key + "x")
  expect_error(
    anthropic.AuthenticationError, 401, "authentication_error", lambda: wrong.messages.create(**s.fields()))


if __name__ == "__main__":
  sys.exit(client_check.main(__doc__, f"anthropic {anthropic.__version__}", Subject, "http://127.0.0.1:8000"))
