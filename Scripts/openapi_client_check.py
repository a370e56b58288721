#!/usr/bin/env python3
"""Checks the OpenAPI document of a running Apus server.

    python3 -m venv .venv && .venv/bin/pip install openapi-spec-validator
    .venv/bin/python Scripts/openapi_client_check.py http://127.0.0.1:8000 [--api-key KEY]

The document must be valid OpenAPI 3.1, its schemas valid JSON Schema, and the server must agree with it on examples. Prints
one line per check and exits with 0 if all of them passed, else with 1.
"""

import importlib.metadata
import json
import sys
import urllib.error
import urllib.request

import jsonschema
import openapi_spec_validator

import client_check
from client_check import check

MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"name": "f", "parameters": {"type": "object"}}
# Paths, with bodies that clients send.
GOOD = [
  ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": -1}}),
  ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 2, "tools": [{"type": "function", "function": TOOL}]}),
  ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, "echo": True}),
  ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1, "logprobs": 1}),
  ("/v1/responses", {"input": "Hello", "max_output_tokens": 2, "metadata": {"a": "b"}, "truncation": "auto"}),
  ("/v1/responses", {
    "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}], "max_output_tokens": 2,
    "tools": [{"type": "function", **TOOL}], "tool_choice": "auto", "text": {"format": {"type": "text"}}}),
  ("/v1/responses/input_tokens", {"input": "Hello"}),
  ("/v1/conversations", {"items": [{"type": "message", "role": "user", "content": "Hello"}], "metadata": {"a": "b"}}),
  ("/v1/messages", {"max_tokens": 2, "messages": MESSAGES}),
  ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 2}}),
  ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}}),
  ("/tokenize", {"prompt": "a"}),
]
# Bodies that are wrong in one member.
BAD = [
  ("/v1/chat/completions", {"messages": "Hello"}), ("/v1/chat/completions", {"messages": MESSAGES, "temperature": "hot"}),
  ("/v1/completions", {"max_tokens": 1}), ("/v1/completions", {"prompt": "a", "max_tokens": "b"}),
  ("/v1/responses", {"input": 3}), ("/v1/responses", {"input": "a", "truncation": "some"}),
  ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}),
  ("/v1/conversations", {"items": "x"}), ("/v1/conversations", {"metadata": {"a": 1}}),
  ("/v1/batches", {"endpoint": "/v1/completions", "completion_window": "24h"}),
  ("/v1/batches", {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "1h"}),
  ("/v1/embeddings", {"input": {}}), ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}),
  ("/v1/rerank", {"query": "a"}), ("/v1/score", {"text_1": 3, "text_2": "a"}),
  ("/v1/messages", {"messages": MESSAGES}), ("/generate", {"text": 3}),
]


class Subject:
  """The server under test and its document."""

  def __init__(self, url, key):
    self.url = url
    self.key = key
    self.document = json.loads(self.send("/openapi.json")[1])
    self.model = json.loads(self.send("/v1/models")[1])["data"][0]["id"]

  def send(self, path, body=None):
    headers = {"Content-Type": "application/json"}
    if self.key:
      headers["Authorization"] = f"Bearer {self.key}"
    data = None if body is None else json.dumps(body).encode()
    try:
      with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
        return answer.status, answer.read()
    except urllib.error.HTTPError as error:
      return error.code, error.read()

  def validator(self, path):
    content = self.document["paths"][path]["post"]["requestBody"]["content"]
    schema = {"$ref": content["application/json"]["schema"]["$ref"], "components": self.document["components"]}
    return jsonschema.Draft202012Validator(schema)


@check
def the_document_is_valid(s):
  openapi_spec_validator.validate(s.document)


@check
def schemas_are_valid(s):
  for name, schema in s.document["components"]["schemas"].items():
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object", name


@check
def what_the_schemas_take_is_taken(s):
  for path, body in GOOD:
    errors = list(s.validator(path).iter_errors(body))
    assert not errors, (path, body, errors[0].message)
    status, answer = s.send(path, body)
    assert status == 200, (path, body, answer)


@check
def what_the_schemas_refuse_is_refused(s):
  for path, body in BAD:
    assert not s.validator(path).is_valid(body), (path, body)
    status, answer = s.send(path, body)
    assert status == 400, (path, body, status, answer)


if __name__ == "__main__":
  name = f"openapi-spec-validator {importlib.metadata.version('openapi-spec-validator')}"
  sys.exit(client_check.main(__doc__, name, Subject, "http://127.0.0.1:8000"))
