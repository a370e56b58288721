#!/usr/bin/env python3
"""Writes Sources/ApusCore/UnicodeData.swift.

Tokenizers must agree with Hugging Face `tokenizers` about every character, and that library mixes Unicode versions: its
regex engine, its normalisation tables, its punctuation test and Rust's own character methods each have theirs. So the
tables are not taken from one edition of the Unicode Character Database but observed: the library is asked about every
code point. Needs `pip install tokenizers==0.23.3 regex` (the latter only names scripts and case pairs to ask about).

Every table is a list of numbers in base 32, least digit first, one character per digit: '0' + digit, plus 32 when
another digit follows.
"""
import sys

import regex
import unicodedata
from tokenizers import Regex
from tokenizers import normalizers as N
from tokenizers import pre_tokenizers as P

CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Cs Co Cn").split()
POINTS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def covered(pre_tokenizer, text):
    """Which characters of a text remain after splitting."""
    kept = bytearray(len(text))
    for _, (start, end) in pre_tokenizer.pre_tokenize_str(text):
        kept[start:end] = b"\1" * (end - start)
    return kept


def members(pattern, points=POINTS):
    kept = covered(P.Split(Regex(f"(?:{pattern})+"), "removed"), "".join(map(chr, points)))
    return {c for c, k in zip(points, kept) if not k}


def splits_after_a(pre_tokenizer):
    """Characters that a pre-tokenizer separates from a letter before them."""
    text = "".join("a" + chr(c) for c in POINTS)
    starts = bytearray(len(text) + 1)
    for _, (start, _) in pre_tokenizer.pre_tokenize_str(text):
        starts[start] = 1
    return {c for i, c in enumerate(POINTS) if starts[2 * i + 1]}


def encode(numbers):
    out = []
    for number in numbers:
        assert number >= 0
        while True:
            digit = number & 31
            number >>= 5
            out.append(chr(0x30 + digit + (32 if number else 0)))
            if not number:
                break
    return "".join(out)


def ranges(points):
    """Sorted, disjoint ranges as gap from the previous end and length less one."""
    result, previous = [], 0
    points = sorted(points)
    index = 0
    while index < len(points):
        end = index
        while end + 1 < len(points) and points[end + 1] == points[end] + 1:
            end += 1
        result += [points[index] - previous, points[end] - points[index]]
        previous = points[end] + 1
        index = end + 1
    return result


def signed(number):
    return number << 1 if number >= 0 else (-number << 1) - 1


tables = {}
notes = {}


def table(name, note, numbers):
    tables[name] = encode(numbers)
    notes[name] = note
    print(f"{name}: {len(tables[name])} characters", file=sys.stderr)


# General categories, as runs over all code points.
category = bytearray([CATEGORIES.index("Cn")]) * 0x110000
for c in range(0xD800, 0xE000):
    category[c] = CATEGORIES.index("Cs")
for index, name in enumerate(CATEGORIES):
    if name not in ("Cs", "Cn"):
        for c in members(rf"\p{{{name}}}"):
            category[c] = index
runs, start = [], 0
for c in range(1, 0x110001):
    if c == 0x110000 or category[c] != category[start]:
        runs += [category[start], c - start - 1]
        start = c
table("categories", "General category of the pattern engine: category and length less one of runs.", runs)
assigned = [c for c in POINTS if CATEGORIES[category[c]] not in ("Cn", "Co")]

word_categories = {CATEGORIES.index(n) for n in "Lu Ll Lt Lm Lo Mn Mc Me Nd Pc".split()}
by_category = {c for c in POINTS if category[c] in word_categories}
word = members(r"\w")
table("wordDifferences", r"Where `\w` of patterns differs from L, M, Nd and Pc.", ranges(word ^ by_category))
space = members(r"\s")
assert space == {c for c, k in zip(POINTS, covered(P.WhitespaceSplit(), "".join(map(chr, POINTS)))) if not k}
table("whiteSpace", "White space.", ranges(space))

# Rust's regex: `\w` and Rust's characters: numeric.
text = "".join("a" + chr(c) + " " for c in POINTS)
joined = bytearray(len(text))
for _, (start, end) in P.Whitespace().pre_tokenize_str(text):
    if end - start == 2:
        joined[start] = 1
rust_word = {c for i, c in enumerate(POINTS) if joined[3 * i]}
table("plainWordDifferences", r"Where `\w` of the Whitespace pre-tokenizer and of added tokens differs from patterns.",
      ranges(rust_word ^ word))
numeric = splits_after_a(P.Digits(individual_digits=False))
numbers = {c for c in POINTS if CATEGORIES[category[c]] in ("Nd", "Nl", "No")}
table("numericDifferences", "Where the Digits pre-tokenizer differs from N.", ranges(numeric ^ numbers))
punctuation = splits_after_a(P.Punctuation("isolated"))
by_category = {c for c in POINTS if CATEGORIES[category[c]] in "Pc Pd Ps Pe Pi Pf Po".split()}
table("punctuationDifferences", "Where the Punctuation pre-tokenizer differs from P.", ranges(punctuation ^ by_category))
bert = {c for c in splits_after_a(P.BertPreTokenizer()) if c not in space}
assert bert == punctuation, sorted(map(hex, bert ^ punctuation))[:20]

# Normalizers that look at single characters.
clean = N.BertNormalizer(clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False)
results = {c: clean.normalize_str("a" + chr(c)) for c in POINTS}
table("bertRemoved", "Characters that the Bert normalizer removes.", ranges(c for c in POINTS if results[c] == "a"))
bert_space = {c for c in POINTS if results[c] == "a "}
table("bertSpaces", "Characters that the Bert normalizer turns into a space.", ranges(bert_space))
assert all(results[c] in ("a", "a ", "a" + chr(c)) for c in POINTS)
strip = N.StripAccents()
table("accents", "Characters that StripAccents removes.", ranges(c for c in POINTS if strip.normalize_str("a" + chr(c)) == "a"))
strip = N.BertNormalizer(clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False)
table("bertAccents", "Characters that the Bert normalizer removes as accents.",
      ranges(c for c in POINTS if strip.normalize_str("a" + chr(c)) == "a"))
chinese = N.BertNormalizer(clean_text=False, handle_chinese_chars=True, strip_accents=False, lowercase=False)
table("bertChinese", "Characters that the Bert normalizer sets apart.",
      ranges(c for c in POINTS if chinese.normalize_str(chr(c)) == f" {chr(c)} "))
nmt = N.Nmt()
results = {c: nmt.normalize_str("a" + chr(c)) for c in POINTS}
table("nmtRemoved", "Characters that Nmt removes.", ranges(c for c in POINTS if results[c] == "a"))
table("nmtSpaces", "Characters that Nmt turns into a space.", ranges(c for c in POINTS if results[c] == "a " and c != 32))

lower = N.Lowercase()
entries, previous = [], 0
for c in POINTS:
    mapped = lower.normalize_str(chr(c))
    if mapped != chr(c):
        entries += [c - previous, len(mapped) - 1] + [signed(ord(m) - c) for m in mapped]
        previous = c
table("lowercase", "Lower case: gap, length less one, signed differences of the result.", entries)

# Normalisation.
nfd, nfkd, nfc, nfkc = N.NFD(), N.NFKD(), N.NFC(), N.NFKC()
canonical, compatible = [], []
previous = [0, 0]
decomposition = {}
for c in POINTS:
    if 0xAC00 <= c < 0xD7A4:
        continue
    d, k = nfd.normalize_str(chr(c)), nfkd.normalize_str(chr(c))
    if d != chr(c):
        decomposition[c] = d
        canonical += [c - previous[0], len(d) - 1] + [signed(ord(m) - c) for m in d]
        previous[0] = c
    if k != d:
        compatible += [c - previous[1], len(k) - 1] + [signed(ord(m) - c) for m in k]
        previous[1] = c
table("canonical", "Full canonical decompositions: gap, length less one, signed differences. Hangul left out.", canonical)
table("compatible", "Full compatibility decompositions that differ from the canonical ones, likewise.", compatible)

# Primary composites: those whose pair of first part and last mark composes back.
pairs, previous = [], 0
for c, d in sorted(decomposition.items()):
    if len(d) < 2 or nfc.normalize_str(d) != chr(c):
        continue
    first = nfc.normalize_str(d[:-1])
    assert len(first) == 1 and nfc.normalize_str(first + d[-1]) == chr(c), hex(c)
    pairs += [c - previous, signed(ord(first) - c), signed(ord(d[-1]) - c)]
    previous = c
table("compositions", "Composites: gap, signed differences of the first part and of the second.", pairs)

# Combining classes, from how marks are reordered against marks of known class.
known = {}
for c in POINTS:
    k = unicodedata.combining(chr(c))
    # A newer mark would not be known to the library.
    if k and nfd.normalize_str(chr(c) + "\u0334") == ("\u0334" + chr(c) if k > 1 else chr(c) + "\u0334"):
        known.setdefault(k, chr(c))
representatives = sorted(known.items())


def reorders(first, second):
    return nfd.normalize_str(first + second) == second + first


classes = []
for c in assigned:
    m = chr(c)
    if nfd.normalize_str(m) != m:
        m = nfd.normalize_str(m)
        if len(m) != 1 or m == chr(c):
            continue
    above = [k for k, r in (representatives if reorders(m, "\u0334") or reorders("\U0001D16D", m) or
                            reorders("\u0345", m) else []) if r != m and reorders(m, r)]
    below = [k for k, r in (representatives if above or reorders("\u0345", m) else []) if r != m and reorders(r, m)]
    if not above and not below:
        continue
    low = max(above, default=0)
    high = min(below, default=256)
    candidates = [k for k, r in representatives if low < k < high and (r == m or not any(q == m for _, q in representatives))]
    assert len(candidates) == 1, (hex(c), low, high, candidates)
    classes.append((c, candidates[0]))
entries, previous = [], 0
for c, k in classes:
    entries += [c - previous, k]
    previous = c
table("combiningClasses", "Canonical combining classes: gap and class.", entries)

# Case pairs for (?i), as the pattern engine matches them.
groups = {}
for c in assigned:
    variants = {chr(c).lower(), chr(c).upper(), chr(c).title(), chr(c).casefold()}
    for v in variants:
        if len(v) == 1 and v != chr(c):
            groups.setdefault(c, set()).add(ord(v))
            groups.setdefault(ord(v), set()).add(c)
changed = True
while changed:
    changed = False
    for c in list(groups):
        extra = set().union(*(groups[v] for v in groups[c])) - groups[c] - {c}
        if extra:
            groups[c] |= extra
            changed = True
entries, previous = [], 0
for c in sorted(groups):
    split = P.Split(Regex("(?i:\\x{%x})" % c), "removed")
    matched = [v for v in sorted(groups[c]) if not split.pre_tokenize_str(chr(v))]
    if matched:
        entries += [c - previous, len(matched) - 1] + [signed(v - c) for v in matched]
        previous = c
table("caseVariants", "Other characters that a character matches in (?i): gap, count less one, signed differences.", entries)

# Scripts, of the pattern engine and of the UnicodeScripts pre-tokenizer.
names = sorted({regex.sub(r"[ _-]", "", n) for n in """
Adlam Ahom Anatolian_Hieroglyphs Arabic Armenian Avestan Balinese Bamum Bassa_Vah Batak Bengali Bhaiksuki Bopomofo Brahmi
Braille Buginese Buhid Canadian_Aboriginal Carian Caucasian_Albanian Chakma Cham Cherokee Chorasmian Common Coptic
Cuneiform Cypriot Cypro_Minoan Cyrillic Deseret Devanagari Dives_Akuru Dogra Duployan Egyptian_Hieroglyphs Elbasan Elymaic
Ethiopic Georgian Glagolitic Gothic Grantha Greek Gujarati Gunjala_Gondi Gurmukhi Han Hangul Hanifi_Rohingya Hanunoo
Hatran Hebrew Hiragana Imperial_Aramaic Inherited Inscriptional_Pahlavi Inscriptional_Parthian Javanese Kaithi Kannada
Katakana Kawi Kayah_Li Kharoshthi Khitan_Small_Script Khmer Khojki Khudawadi Lao Latin Lepcha Limbu Linear_A Linear_B Lisu
Lycian Lydian Mahajani Makasar Malayalam Mandaic Manichaean Marchen Masaram_Gondi Medefaidrin Meetei_Mayek Mende_Kikakui
Meroitic_Cursive Meroitic_Hieroglyphs Miao Modi Mongolian Mro Multani Myanmar Nabataean Nag_Mundari Nandinagari
New_Tai_Lue Newa Nko Nushu Nyiakeng_Puachue_Hmong Ogham Ol_Chiki Old_Hungarian Old_Italic Old_North_Arabian Old_Permic
Old_Persian Old_Sogdian Old_South_Arabian Old_Turkic Old_Uyghur Oriya Osage Osmanya Pahawh_Hmong Palmyrene Pau_Cin_Hau
Phags_Pa Phoenician Psalter_Pahlavi Rejang Runic Samaritan Saurashtra Sharada Shavian Siddham SignWriting Sinhala Sogdian
Sora_Sompeng Soyombo Sundanese Syloti_Nagri Syriac Tagalog Tagbanwa Tai_Le Tai_Tham Tai_Viet Takri Tamil Tangsa Tangut
Telugu Thaana Thai Tibetan Tifinagh Tirhuta Toto Ugaritic Vai Vithkuqi Wancho Warang_Citi Yezidi Yi Zanabazar_Square
""".split()})
script = {}
for index, name in enumerate(names):
    for c in members(rf"\p{{{name}}}", assigned):
        script[c] = index
runs, previous, start = [], 0, None
ordered = sorted(script)
index = 0
while index < len(ordered):
    end = index
    while (end + 1 < len(ordered) and ordered[end + 1] == ordered[end] + 1
           and script[ordered[end + 1]] == script[ordered[index]]):
        end += 1
    runs += [ordered[index] - previous, ordered[end] - ordered[index], script[ordered[index]]]
    previous = ordered[end] + 1
    index = end + 1
table("scripts", "Scripts of the pattern engine: gap, length less one, index in `scriptNames`.", runs)

splitter = P.UnicodeScripts()
counts = {}
first_of = {}
for c in assigned:
    if c in script:
        first_of.setdefault(script[c], []).append(c)


def same(a, b):
    return len(splitter.pre_tokenize_str(chr(a) + chr(b))) == 1


def is_any(c):
    return same(0x41, c) and same(0x0430, c)


any_points = {c for c in POINTS if is_any(c)}
representative = {}
merged = {}
for s, points in first_of.items():
    for c in points:
        if c not in any_points:
            for other, r in representative.items():
                if same(r, c):
                    merged[s] = other
                    break
            else:
                representative[s] = c
                merged[s] = s
            break
differences = []
for c in POINTS:
    if c in any_points:
        value = len(names)
    else:
        s = merged.get(script.get(c, -1), -1)
        if s >= 0 and same(representative[s], c):
            value = s
        else:
            value = next(o for o, r in representative.items() if same(r, c))
    expected = merged.get(script[c], len(names)) if c in script else len(names)
    if value != expected:
        differences.append((c, value))
entries, previous, index = [], 0, 0
while index < len(differences):
    end = index
    while (end + 1 < len(differences) and differences[end + 1][0] == differences[end][0] + 1
           and differences[end + 1][1] == differences[index][1]):
        end += 1
    entries += [differences[index][0] - previous, differences[end][0] - differences[index][0], differences[index][1]]
    previous = differences[end][0] + 1
    index = end + 1
table("splitScriptDifferences",
      "Where the UnicodeScripts pre-tokenizer differs after merging: gap, length less one, script or their number for any.",
      entries)
# Scripts newer than that pre-tokenizer go with every script.
table("splitScriptMerges", "Scripts and what the UnicodeScripts pre-tokenizer takes them for: a script or any.",
      [x for s in range(len(names)) if merged.get(s, len(names)) != s for x in (s, merged.get(s, len(names)))])

with open("Sources/ApusCore/UnicodeData.swift", "w") as out:
    out.write("// Made by Scripts/unicode_tables.py, which says how; do not edit.\n\n")
    out.write("/// Unicode properties in compact form, as `UnicodeTables` reads them.\npackage enum UnicodeData {\n")
    out.write("  /// Names of scripts, by index.\n  package static let scriptNames = [\n")
    line = "   "
    for name in names:
        if len(line) + len(name) + 4 > 110:
            out.write(line + "\n")
            line = "   "
        line += f' "{name}",'
    out.write(line + "\n  ]\n")
    for name, text in tables.items():
        out.write(f'\n  /// {notes[name]}\n  package static let {name}: StaticString = #"""\n')
        for start in range(0, max(1, len(text)), 100):
            out.write("    " + text[start:start + 100] + "\n")
        out.write('    """#\n')
    out.write("}\n")
