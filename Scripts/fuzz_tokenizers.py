#!/usr/bin/env python3
"""Differential fuzzing of tokenizers against Hugging Face `tokenizers` (needs `pip install tokenizers==0.23.3`).

  fuzz_tokenizers.py APUS TOKENIZER.json... [--count 100000] [--seed 1]
      sends COUNT random strings and COUNT / 4 random id sequences per tokenizer through `APUS tokenize --jsonl` and
      compares ids and decoded text: all planes, combining marks, controls, mixed scripts, code, runs of white space, the
      tokenizer's own tokens, and ill-formed bytes, which both must read as U+FFFD.

  fuzz_tokenizers.py APUS --grammar COUNT [--texts 60] [--seed 1]
      builds COUNT odd tokenizers from every class of `tokenizers` at random (models with their options, normalizers,
      pre-tokenizers, post-processors, decoders, added tokens with every flag) and compares them in the same way.

  fuzz_tokenizers.py APUS --sentencepiece COUNT [--texts 200] [--seed 1]
      trains COUNT SentencePiece models with random options (needs `pip install sentencepiece`) and compares
      `APUS tokenize --no-special` on the tokenizer.model with the library.

Exit status 1 on any difference. Text left over after `--skip-special` is compared with decoding the ids that are not
special: tokenizers 0.23 itself keeps special tokens whose `normalized` flag is set.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

from golden_tokenizers import SPACES, WORDS, Texts, expectation  # noqa: E402

CHUNK = 5000
CODE = ["def f(x):\n    return x+1\n", "for (int i = 0; i < n; ++i) {\n\t", "\n\n\n", "    " * 3, "<a href='x'>", "&amp;", "\\n", "0xDEAD",
        "x->y", "!=", "===", "/* c */", "# -*-", "print(\"é\")", "${a}", "snake_case_name", "camelCaseName", "SELECT * FROM t;"]
MARKS = [chr(c) for c in (*range(0x300, 0x312), 0x345, 0x5B0, 0x64B, 0x93C, 0x94D, 0xE31, 0x1AB0, 0x20D0, 0x3099, 0xFE0F, 0x200D, 0x1D165)]
CONTROLS = [chr(c) for c in (*range(32), 0x7F, *range(0x80, 0xA0), 0xAD, 0x200B, 0x200E, 0x2028, 0x2029, 0x2060, 0xFEFF, 0xFFFD, 0xFFFE, 0xE0001)]


class MoreTexts(Texts):
    """Random text with code, stacks of marks, controls and noncharacters besides."""

    def more(self):
        r = self.random
        x = r.random()
        if x < 0.6:
            return self.text()
        out = []
        for _ in range(r.choice((1, 2, 4, 9))):
            y = r.random()
            if y < 0.25:
                out.append(r.choice(CODE))
            elif y < 0.45:
                out.append(r.choice(WORDS) + "".join(r.choices(MARKS, k=r.randint(1, 5))))
            elif y < 0.6:
                out.append("".join(r.choices(CONTROLS, k=r.randint(1, 4))))
            elif y < 0.7:
                out.append(r.choice(SPACES) * r.randint(1, 12))
            elif y < 0.85:
                # Every plane alike.
                plane = r.randrange(17) << 16
                c = plane + r.randrange(0x10000)
                out.append(chr(c) if not 0xD800 <= c < 0xE000 else "?")
            else:
                out.append(self.text(longest=3))
        return "".join(out)


def run(apus, arguments, lines):
    done = subprocess.run([apus, "tokenize", "--jsonl", *arguments], input=b"\n".join(lines) + b"\n", stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"apus tokenize {arguments} ended with status {done.returncode}")
    answers = [json.loads(line) for line in done.stdout.decode().split("\n") if line]
    if len(answers) != len(lines):
        raise SystemExit(f"{len(lines)} lines, {len(answers)} answers")
    return answers


def broken(r, text):
    """Bytes with ill-formed UTF-8 in them, as Python and Apus both read it: U+FFFD for every maximal part."""
    data = bytearray(text.encode())
    for _ in range(r.randint(1, 4)):
        place = r.randint(0, len(data))
        data[place:place] = r.choice([b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xff", b"\xc0\x80", b"\xe4\xb8", b"\xf0\x9f\x98", b"\x80",
                                      b"\xf4\x90\x80\x80", b"\xfe", b"\xc3"])
    return bytes(data)


def compare_broken(apus, path, oracle, texts, count):
    """Text with ill-formed bytes, a process each."""
    different = 0
    for _ in range(count):
        data = broken(texts.random, texts.more())
        done = subprocess.run([apus, "tokenize", "--tokenizer", path], input=data, capture_output=True)
        wanted = oracle.encode(data.decode("utf-8", "replace"))
        if [int(i) for i in done.stdout.split()] != wanted:
            different += 1
            print("DIFFERENT", path, data, "\n  expected", wanted, "\n  got     ", done.stdout, done.stderr, flush=True)
    return different


class Oracle:
    """What the library makes of text and ids."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, ids):
        return (self.tokenizer.decode(ids, skip_special_tokens=False),
                self.tokenizer.decode([i for i in ids if i not in self.special], skip_special_tokens=False))


def compare(apus, path, oracle, texts, count, show=5, id_share=0.25):
    vocabulary = oracle.tokenizer.get_vocab(True)
    known = set(vocabulary.values())
    limit = max(known) + 1
    different = shown = done = 0
    while done < count:
        size = min(CHUNK, count - done)
        requests, lines = [], []
        for _ in range(size):
            text = texts.more()
            requests.append(text)
            lines.append(json.dumps({"text": text}, ensure_ascii=texts.random.random() < 0.5).encode())
        for _ in range(int(size * id_share)):
            ids = [i for i in texts.ids(limit) if i in known]
            requests.append(ids)
            lines.append(json.dumps({"ids": ids}).encode())
        answers = run(apus, ["--tokenizer", path], lines)
        skipped = run(apus, ["--tokenizer", path, "--skip-special"], lines)
        for request, answer, skip in zip(requests, answers, skipped, strict=True):
            try:
                ids = oracle.encode(request) if isinstance(request, str) else request
            except BaseException as error:  # noqa: BLE001 the library raises plain exceptions, and panics
                if isinstance(error, KeyboardInterrupt):
                    raise
                if "PanicException" in type(error).__name__:
                    continue
                if "error" in answer:
                    continue
                ids, wanted = None, str(error)
            else:
                try:
                    wanted = oracle.decode(ids)
                except BaseException as error:  # noqa: BLE001
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    wanted = None
            got = (answer.get("text"), skip.get("text"))
            if answer.get("ids") != ids or (wanted is not None and got != wanted):
                different += 1
                if shown < show:
                    shown += 1
                    print("DIFFERENT", path, repr(request), "\n  expected", ids, repr(wanted), "\n  got     ", answer, skip.get("text"), flush=True)
        done += size
    return different


def fuzz(arguments):
    failed = 0
    for path in arguments.tokenizers:
        tokenizer = Tokenizer.from_file(path)
        texts = MoreTexts(arguments.seed, tokenizer)
        oracle = Oracle(tokenizer)
        different = compare(arguments.apus, path, oracle, texts, arguments.count)
        ill_formed = min(50, arguments.count // 100)
        different += compare_broken(arguments.apus, path, oracle, texts, ill_formed)
        print(f"{path}: {arguments.count} strings, {ill_formed} with ill-formed bytes, {arguments.count // 4} id sequences, "
              f"seed {arguments.seed}: {different} differences", flush=True)
        failed += different
    return failed


# Odd tokenizers ------------------------------------------------------------------------------------------------------

LETTERS = list("abcdefghijklmnoprstuwxyz") + list("ABCX .,-'0123é中文▁Ġ_#") + ["ﬁ", "İ", "ß", "\u0301", "😀", "한", "\n"]
HEXADECIMAL = ["<0x%02X>" % i for i in range(256)]
REGEXES = [r"\s+", r"\w+|[^\w\s]+", r"\p{L}+", r"(?i:the|of)", r"[A-Z]", r"x*", r"(?=[A-Z])", r"(?<=a)b", r"\d{1,3}", r"[^\S\r\n]+", r"\p{Han}",
           r"(?<!\w)o", r"(\w)\1", r"\b", r"$", r"^", r"a|ab|abc", r"[\p{P}\p{S}]", r"\s+(?!\S)|\s+", r"a++", r"(?>a+)b?", r".", r"(?s:.)", r"\X", r"\R", r"[[:alpha:]]+",
           r"[a-c&&[^b]]+", r"é", r"(?m:^)x?", r"\h", r"\p{^L}", r"\P{N}{2,}", r"(?:l|e){2}", r"\G\w"]


def regex(r):
    return Regex(r.choice(REGEXES))


def pattern(r):
    return r.choice([" ", "e", "th", "▁", "  ", "é", "l"]) if r.random() < 0.4 else regex(r)


def charsmaps():
    """Compiled character maps of SentencePiece, taken from models trained on the spot."""
    try:
        import io
        import sentencepiece as spm
        from sentencepiece import sentencepiece_model_pb2 as pb
    except ImportError:
        return []
    found = []
    for rule in ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"):
        out = io.BytesIO()
        spm.SentencePieceTrainer.train(sentence_iterator=iter(["hello world of the words"] * 50), model_writer=out, vocab_size=20,
                                       normalization_rule_name=rule, hard_vocab_limit=False, minloglevel=2)
        model = pb.ModelProto()
        model.ParseFromString(out.getvalue())
        found.append(model.normalizer_spec.precompiled_charsmap)
    return found


def a_normalizer(r, maps, depth=1):
    n = normalizers
    choices = [n.NFC, n.NFD, n.NFKC, n.NFKD, n.Lowercase, n.Nmt, n.StripAccents,
               lambda: n.Strip(r.random() < 0.5, r.random() < 0.5), lambda: n.Prepend(r.choice(["▁", "x", " ", "ab"])),
               lambda: n.Replace(pattern(r), r.choice(["", " ", "▁", "zz", "é"])),
               lambda: n.BertNormalizer(r.random() < 0.5, r.random() < 0.5, r.choice([None, True, False]), r.random() < 0.5)]
    if maps:
        choices.append(lambda: n.Precompiled(r.choice(maps)))
    if depth > 0 and r.random() < 0.45:
        return n.Sequence([a_normalizer(r, maps, depth - 1) for _ in range(r.randint(0, 3))])
    return r.choice(choices)()


def a_pre_tokenizer(r, depth=1):
    p = pre_tokenizers
    behaviors = ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
    choices = [lambda: p.ByteLevel(r.random() < 0.5, use_regex=r.random() < 0.5), p.BertPreTokenizer,
               lambda: p.CharDelimiterSplit(r.choice("e ▁中")), lambda: p.Digits(r.random() < 0.5),
               lambda: p.Metaspace(r.choice("▁_x"), r.choice(["always", "first", "never"]), r.random() < 0.6),
               lambda: p.Punctuation(r.choice(behaviors)), lambda: p.Split(pattern(r), r.choice(behaviors), r.random() < 0.3),
               p.UnicodeScripts, p.Whitespace, p.WhitespaceSplit, lambda: p.FixedLength(r.randint(1, 6))]
    if depth > 0 and r.random() < 0.4:
        return p.Sequence([a_pre_tokenizer(r, depth - 1) for _ in range(r.randint(0, 3))])
    return r.choice(choices)()


def a_decoder(r, depth=1):
    d = decoders
    choices = [d.ByteLevel, d.ByteFallback, d.Fuse, lambda: d.BPEDecoder(r.choice(["</w>", "@@", "e"])),
               lambda: d.CTC(r.choice(["<pad>", "a", "▁"]), r.choice(["|", "o", "▁"]), r.random() < 0.5),
               lambda: d.Metaspace(r.choice("▁_x"), r.choice(["always", "first", "never"])), lambda: d.WordPiece(r.choice(["##", "@", "e"]), r.random() < 0.5),
               lambda: d.Replace(pattern(r), r.choice(["", " ", "X"])), lambda: d.Strip(r.choice(" e▁"), r.randint(0, 2), r.randint(0, 2))]
    if depth > 0 and r.random() < 0.5:
        return d.Sequence([a_decoder(r, depth - 1) for _ in range(r.randint(0, 4))])
    return r.choice(choices)()


def a_post_processor(r, ids, depth=1):
    x = processors
    (a, ia), (b, ib) = r.sample(ids, 2)
    choices = [lambda: x.BertProcessing((a, ia), (b, ib)), lambda: x.RobertaProcessing((a, ia), (b, ib), r.random() < 0.5, r.random() < 0.5),
               lambda: x.ByteLevel(trim_offsets=r.random() < 0.5),
               lambda: x.TemplateProcessing(single=r.choice(["[A] $A [B]", "[A]:0 [A]:0 $A:1", "$A", "$0 [B]", "[B] [A] $A:2 [A]"]).replace("[A]", a).replace("[B]", b),
                                            pair="$A:0 $B:1", special_tokens=[(a, ia), (b, ib)])]
    if depth > 0 and r.random() < 0.3:
        return x.Sequence([a_post_processor(r, ids, depth - 1) for _ in range(r.randint(1, 3))])
    return r.choice(choices)()


def subwords(r, count, marks=()):
    """Strings that the random texts are likely to hold."""
    found = set()
    source = " ".join(WORDS) + " the world of words. hello hello, don't e\u0301 "
    while len(found) < count:
        start = r.randrange(len(source) - 1)
        piece = source[start:start + r.choice((1, 2, 2, 3, 3, 4, 6))].replace(" ", r.choice(["▁", "Ġ", ""]))
        if piece and " " not in piece:
            found.add(r.choice(["", *marks]) + piece if marks else piece)
    return sorted(found)


def a_model(r):
    """A model as the JSON of a tokenizer.json."""
    kind = r.choice(["bpe", "bpe", "bpe", "bytes", "unigram", "unigram", "wordpiece", "wordlevel"])
    if kind == "bytes":
        # Byte-level BPE: all 256 letters of the alphabet, merges of letters.
        tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = []
        for _ in range(r.randint(0, 120)):
            left, right = r.choice(tokens[r.choice((0, -60)):]), r.choice(tokens[-80:])
            if left + right not in tokens:
                tokens.append(left + right)
            merges.append((left, right))
        merges = list(dict.fromkeys(merges))
        return {"type": "BPE", "dropout": r.choice([None, None, 0.0]), "unk_token": r.choice([None, "<unk>"]) if False else None,
                "continuing_subword_prefix": r.choice([None, ""]), "end_of_word_suffix": r.choice([None, ""]), "fuse_unk": r.random() < 0.3,
                "byte_fallback": False, "ignore_merges": r.random() < 0.4, "vocab": {t: i for i, t in enumerate(tokens)},
                "merges": [f"{a} {b}" for a, b in merges] if r.random() < 0.5 else [list(m) for m in merges]}
    if kind == "bpe":
        prefix = r.choice(["", "", "", "##", "@"])
        suffix = r.choice(["", "", "", "</w>", "_"])
        letters = r.sample(LETTERS, r.randint(10, len(LETTERS)))
        tokens = list(dict.fromkeys(["<unk>", *letters, *(prefix + c for c in letters), *(c + suffix for c in letters), *(prefix + c + suffix for c in letters)]))
        merges = []
        for _ in range(r.randint(0, 150)):
            left, right = r.choice(tokens[1:]), r.choice(tokens[1:])
            if (suffix and left.endswith(suffix)) or (prefix and not right.startswith(prefix)) or "\n" in left + right or " " in left + right:
                continue
            joined = left + right[len(prefix):]
            if len(joined) > 16:
                continue
            if joined not in tokens:
                tokens.append(joined)
            merges.append((left, right))
        merges = list(dict.fromkeys(merges))
        fallback = r.random() < 0.4
        if fallback:
            tokens += [h for h in HEXADECIMAL if r.random() < 0.995 or len(HEXADECIMAL) > 256]
        return {"type": "BPE", "dropout": None, "unk_token": r.choice([None, "<unk>", "<unk>"]), "continuing_subword_prefix": prefix or r.choice([None, ""]),
                "end_of_word_suffix": suffix or r.choice([None, ""]), "fuse_unk": r.random() < 0.5, "byte_fallback": fallback,
                "ignore_merges": r.random() < 0.4, "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [list(m) for m in merges]}
    if kind == "unigram":
        tokens = list(dict.fromkeys(["<unk>", *r.sample(LETTERS, r.randint(5, len(LETTERS))), *subwords(r, r.randint(5, 150))]))
        fallback = r.random() < 0.4
        if fallback:
            tokens += HEXADECIMAL
        scores = [round(-r.random() * 12, r.choice((0, 1, 5))) for _ in tokens]
        return {"type": "Unigram", "unk_id": r.choice([0, 0, 0, None]), "vocab": list(map(list, zip(tokens, scores))), "byte_fallback": fallback}
    if kind == "wordpiece":
        prefix = r.choice(["##", "##", "", "@", "▁"])
        words = ["[UNK]", *r.sample(LETTERS, r.randint(5, len(LETTERS))), *subwords(r, 80)]
        tokens = list(dict.fromkeys([*words, *(prefix + w for w in words[1:] if r.random() < 0.6)]))
        return {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": prefix, "max_input_chars_per_word": r.choice([100, 5, 12]),
                "vocab": {t: i for i, t in enumerate(tokens)}}
    tokens = list(dict.fromkeys(["<unk>", *LETTERS, *WORDS, *subwords(r, 60)]))
    return {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(tokens)}, "unk_token": "<unk>"}


def an_added_token(r):
    content = r.choice(["<s>", "</s>", "<a>", "<a", "a>", "<a><b>", "<b>", "Norm Tok", "the", "th", "hello world", "é", "e\u0301", "ÉÀ", "  ", "▁x", "中", "[MASK]",
                        "<|x|>", "<|x|><|y|>", "\n", "A B", "don't", "<unk>", "Ġ", "ﬁ", "3", "_"])
    return AddedToken(content, single_word=r.random() < 0.25, lstrip=r.random() < 0.3, rstrip=r.random() < 0.3, normalized=r.random() < 0.4, special=r.random() < 0.4)


def an_odd_tokenizer(r, maps):
    tokenizer = Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None, "model": a_model(r)}))
    if r.random() < 0.6:
        tokenizer.normalizer = a_normalizer(r, maps, 2)
    if r.random() < 0.75:
        tokenizer.pre_tokenizer = a_pre_tokenizer(r, 2)
    if r.random() < 0.75:
        tokenizer.decoder = a_decoder(r, 2)
    for _ in range(r.randint(0, 8)):
        token = an_added_token(r)
        if token.normalized and tokenizer.normalizer and not tokenizer.normalizer.normalize_str(token.content):
            continue  # the library does not come back from a token without any text
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    if r.random() < 0.5:
        known = [(t, i) for t, i in tokenizer.get_vocab(True).items() if t and " " not in t and "$" not in t and ":" not in t and not t.isspace()]
        tokenizer.post_processor = a_post_processor(r, sorted(known, key=lambda pair: pair[1]), 1)
    return tokenizer


def grammar(arguments):
    maps = charsmaps()
    failed = made = refused = 0
    refusals = {}
    for index in range(arguments.grammar):
        seed = arguments.seed * 1_000_000 + index
        r = random.Random(seed)
        if arguments.verbose:
            print("seed", seed, flush=True)
        try:
            tokenizer = an_odd_tokenizer(r, maps)
        except Exception as error:  # noqa: BLE001 some combinations are refused by the library itself
            if arguments.verbose:
                print(f"seed {seed}: not made: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tokenizer.json")
            tokenizer.save(path)
            probe = subprocess.run([arguments.apus, "tokenize", "--tokenizer", path, "x"], capture_output=True, text=True)
            if probe.returncode and "unknown token" not in probe.stderr:
                refused += 1
                reason = probe.stderr.strip().replace(path, "FILE")
                refusals[reason] = refusals.get(reason, 0) + 1
                continue
            made += 1
            try:
                tokenizer = Tokenizer.from_file(path)
                different = compare(arguments.apus, path, Oracle(tokenizer), MoreTexts(seed, tokenizer), arguments.texts, show=1)
            except SystemExit as error:
                print(error)
                different = 1
            if different:
                failed += 1
                print(f"seed {seed}: {different} differences", flush=True)
                if arguments.keep:
                    tokenizer.save(os.path.join(arguments.keep, f"{seed}.json"))
    for reason, count in sorted(refusals.items(), key=lambda pair: -pair[1])[:30]:
        print(f"refused {count} times: {reason}")
    print(f"{made} odd tokenizers with {arguments.texts} strings each, {refused} refused, {failed} with differences, seed {arguments.seed}")
    return failed


# SentencePiece -------------------------------------------------------------------------------------------------------

def sentencepiece(arguments):
    import io

    import sentencepiece as spm

    failed = made = 0
    for index in range(arguments.sentencepiece):
        seed = arguments.seed * 1_000_000 + index
        r = random.Random(seed)
        texts = MoreTexts(seed)
        options = {
            "model_type": r.choice(["unigram", "bpe", "char", "word"]), "normalization_rule_name": r.choice(["nmt_nfkc", "identity", "nfkc", "nfkc_cf", "nmt_nfkc_cf"]),
            "byte_fallback": r.random() < 0.5, "add_dummy_prefix": r.random() < 0.6, "remove_extra_whitespaces": r.random() < 0.5,
            "treat_whitespace_as_suffix": r.random() < 0.3, "split_digits": r.random() < 0.3, "split_by_unicode_script": r.random() < 0.5,
            "split_by_number": r.random() < 0.5, "split_by_whitespace": r.random() < 0.7, "allow_whitespace_only_pieces": r.random() < 0.4,
            "user_defined_symbols": r.sample(["<u1>", "<u2>", "foo bar", "▁x", "123", "北"], r.randint(0, 3)), "control_symbols": r.sample(["<c1>", "<c2>"], r.randint(0, 2)),
            "bos_id": 1, "eos_id": r.choice([2, -1]), "pad_id": -1, "unk_id": 0, "vocab_size": r.choice([300, 400, 600]), "hard_vocab_limit": False,
            "character_coverage": r.choice([0.98, 1.0, 0.9995]), "minloglevel": 2, "max_sentence_length": 100000}
        if options["model_type"] == "bpe":
            options.pop("treat_whitespace_as_suffix") if r.random() < 0.5 else None
        corpus = [" ".join(r.choices(WORDS, k=r.randint(1, 12))) for _ in range(300)] + ["the world of words, hello  world 123 4567"] * 20
        out = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=out, **options)
        except Exception as error:  # noqa: BLE001
            if arguments.verbose:
                print(f"seed {seed}: not trained: {error}")
            continue
        processor = spm.SentencePieceProcessor(model_proto=out.getvalue())
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "tokenizer.model")
            with open(path, "wb") as file:
                file.write(out.getvalue())
            controls = [c for c in options["control_symbols"]] + ["<s>", "</s>", "<unk>"]
            strings = []
            while len(strings) < arguments.texts:
                text = texts.more().replace("\0", "")
                # Names of control tokens are tokens for transformers and letters for the library.
                if not any(c in text for c in controls):
                    strings.append(text)
            lines = [json.dumps({"text": text}).encode() for text in strings]
            try:
                answers = run(arguments.apus, ["--tokenizer", path, "--no-special"], lines)
            except SystemExit as error:
                print(f"seed {seed}: {error} {options}")
                failed += 1
                continue
            made += 1
            different = 0
            for text, answer in zip(strings, answers):
                ids = processor.encode(text)
                decoded = processor.decode(ids)
                if answer.get("ids") != ids or (arguments.decode and answer.get("text") != decoded):
                    different += 1
                    if different == 1:
                        print("DIFFERENT", repr(text), "\n  expected", ids, repr(decoded), "\n  got     ", answer)
            if different:
                failed += 1
                print(f"seed {seed}: {different} of {len(strings)} differ: {options}", flush=True)
                if arguments.keep:
                    with open(os.path.join(arguments.keep, f"{seed}.model"), "wb") as file:
                        file.write(out.getvalue())
    print(f"{made} SentencePiece models with {arguments.texts} strings each, {failed} with differences, seed {arguments.seed}")
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apus")
    parser.add_argument("tokenizers", nargs="*")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grammar", type=int)
    parser.add_argument("--sentencepiece", type=int)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--keep", help="a folder for tokenizers with differences")
    parser.add_argument("--decode", action="store_true", help="compare decoded text with SentencePiece's too")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    if arguments.grammar:
        failed = grammar(arguments)
    elif arguments.sentencepiece:
        failed = sentencepiece(arguments)
    else:
        failed = fuzz(arguments)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
