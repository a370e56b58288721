"""What the checks with official clients share: a list of checks, and the program that runs them.

A check is a function of the subject, the server under test as a client sees it. It passes unless it raises.
"""

import argparse
import traceback

CHECKS = []


def check(function):
  """Registers a check; its name is the function's."""
  CHECKS.append(function)
  return function


class Skip(Exception):
  """Raised by a check that this server or this call gives nothing to check."""


def main(description, client, make_subject, base, add_arguments=None):
  """Runs all checks and returns the exit status: 0 if none failed, else 1.

  description: the script's docstring, of which the first line is shown.
  client: the client's name and version.
  make_subject: makes the subject of the server's address and its key.
  base: an example of the address.
  add_arguments: adds arguments to the parser; the subject is then made of the parsed ones, too.
  """
  parser = argparse.ArgumentParser(description=description.splitlines()[0])
  parser.add_argument("url", help=f"the server, such as {base}")
  parser.add_argument("--api-key", help="the key that the server was started with")
  if add_arguments:
    add_arguments(parser)
  arguments = parser.parse_args()
  subject = make_subject(arguments.url, arguments.api_key, *([arguments] if add_arguments else []))
  failures = 0
  for function in CHECKS:
    try:
      function(subject)
      print(f"pass  {function.__name__}")
    except Skip as skip:
      print(f"skip  {function.__name__}: {skip}")
    except Exception:  # A failing check must not hide those after it.
      failures += 1
      print(f"FAIL  {function.__name__}")
      traceback.print_exc(limit=3)
  print(f"{client}, model {subject.model}: {len(CHECKS) - failures} of {len(CHECKS)} without failure")
  return 1 if failures else 0
