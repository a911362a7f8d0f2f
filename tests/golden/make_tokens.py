"""Make the golden token ids: small vocabularies as GGUF files, and the ids that llama.cpp gives with them.

    python make_tokens.py vocabularies    writes tokens_*.gguf         (needs tokenizers, gguf)
    python make_tokens.py ids             writes tokens.json from them (needs llama-cpp-python)

The vocabularies are trained on the test strings themselves, without a pre-tokenizer, so that their merges
reach over every place where a pre-tokenizer cuts: a wrong cut shows as a wrong id.
"""

import ctypes
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PRETOKENIZERS = FOLDER.parents[1] / "realm_jax" / "gguf" / "pretokenizers.json"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

STRINGS = [
    "",
    " ",
    "  ",
    "   a",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n  \n",
    "\r\n\r\n",
    " \n \n ",
    "a \n",
    "a\n b",
    "\t\t\tx",
    "\x0b\x0c\x1c\x1f\x85",
    "a\x85b\xa0c\u1680d\u2003e\u2028f\u3000g",
    "\u3000\u3000\u4e2d  \u6587 \u3000",
    "\x00",
    "nul\x00inside\x00",
    "\x01\x02\x7f",
    "Hello",
    "Hello World",
    " Hello World!",
    "Hello, world! How are you?",
    "the quick brown fox jumps over the lazy dog",
    "THE QUICK Brown foX",
    "camelCase XMLHttpRequest iPhone",
    "snake_case __init__ kebab-case",
    "I'm we'll they've don't he'd it's you're",
    "I'M WE'LL THEY'VE DON'T HE'D IT'S YOU'RE",
    "I'm' 'tis 's''t 'Ll '",
    "a'\u017f b'\u212a c\u2019s",
    "0 1 12 123 1234 12345 123456 1234567",
    "1,234,567.89 and 3.14e-10",
    "x1y22z333w4444",
    "2024-01-31T12:34:56",
    "\u0661\u0662\u0663\u0664\u0665 \u0967\u0968\u0969\u096a",
    "\uff11\uff12\uff13 \u00bd\u00b2\u00b3 \u2167 \U0001d7d8\U0001d7d9",
    "12\u066134 \u00b212",
    "...!!!???",
    "a.b.c, (d) [e] {f} <g> \"h\" 'i' `j`",
    "$5 + \u20ac6 = \u00a37 ^ ~ | < > \u00d7 \u00f7 \u2211",
    "http://example.com/a/b?c=d&e=f#g",
    "//comment\n/* block */\n",
    "?/\n!/\r\n./",
    "for (int i = 0; i < n; ++i) {\n\tx[i] += 1;\n}\n",
    "def f(x):\n    if x:\n        return  x\n",
    "    indented",
    "                 many spaces",
    "a                                                                      b",
    "trailing   ",
    "tabs\t\tand \t mixed \n\t ",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u00df\u1e9e",
    "cafe\u0301 nai\u0308ve",
    "\u0301",
    "\u0301\u0302 a\u0301\u0302 1\u0301",
    "\u0628\u0650\u0633\u0652\u0645\u0650 \u0627\u0644\u0644\u0651\u0647\u0650",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u1019\u103c\u1014\u103a\u1019\u102c \u1797\u17b6\u179f\u17b6 \u0ea5\u0eb2\u0ea7",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u662f2024\u5e74\u3002",
    "\u4e2d\u6587English\u6df7\u5408123\u6587\u672c",
    "\u9fa5\u9fa6\u9fff\u3400\uf900\U00020000\U0002a6df\U000323af",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u30ab\u30bf\u30ab\u30ca\uff76\uff80",
    "\uc548\ub155\ud558\uc138\uc694 \u3131\u3134 \u1100\u1161",
    "\u300c\u5f15\u7528\u300d\u2014\u2014\u2026\u2026\u201c\u201d",
    "\u01c5 \u02b0 \u00aa \u10d0 \u2c00 \ufb01 \uff21 \U00010400 \U0001e900",
    "\U0001f600\U0001f680",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u2603\ufe0f",
    "\u200b\u200d\ufeff\u202e",
    "\ufffd\uffff\U0010ffff\ue000\u0378",
    "\U0001e4d0\U00011f50\u2ffc\U0001fae8",
    "\u2581 \u2581\u2581a \u0120b",
    "a" * 70,
    "ab" * 40,
    "9" * 40,
    "=" * 70 + "\n",
    "IMGIMGABCDZ <sentinel:12> IMGIMGZ <sentinel:>",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit.\n\nSed do 1234 eiusmod.",
    "\udcff\udcfe",
    "a\udc80b\udcc3 \udce2\udc96",
    "\udced\udca0\udc80 \udcc0\udc80",
    "\udcf0\udc9f\udc98",
    "<s>",
    "<s> a </s>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|>b <|im_end|> c",
    "<|im_end|><|im_end|>  <|im_end|>",
    "<|endoftext|> <|im_endoftext|>",
    "x<ud>y <ud> z",
    "<ud><ud>",
    "<unk>\n <unused0> <oddly",
    "<mask> a <mask>\n\nb",
    "</s>\n\n  x",
    "[EMPTY_7]",
    "<0x0A><0xE2>",
]
ODD_STRINGS = [text for text in STRINGS if text.isascii() and all(" " <= c < "\x7f" or c == "\n" for c in text)]


def write_gguf(path, model, tokens, types, *, scores=None, merges=None, name="golden", **keys):
    """A vocabulary and nothing else. keys: more of tokenizer.ggml.*"""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if scores is not None:
        writer.add_token_scores(scores)
    if merges is not None:
        writer.add_token_merges(merges)
    for key, value in keys.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32 if isinstance(value, int) else None
        (add or writer.add_string)(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def train(texts, size):
    """Tokens and merges of a byte pair encoding over the characters of the texts."""
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def byte_characters():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def make_vocabularies():
    characters = byte_characters()
    texts = [text.encode("utf-8", "surrogateescape") for text in STRINGS if len(set(text)) > 2 and text != "[EMPTY_7]"]
    encoded = ["".join(characters[byte] for byte in data) for data in texts for _ in range(2)]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]

    learned, merges = train(encoded, 1500)
    special = [
        ("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", NORMAL),
        ("<|endoftext|>", CONTROL), ("<unused0>", CONTROL), ("", UNUSED), ("<ud>", USER_DEFINED),
        ("    ", USER_DEFINED), ("  ", USER_DEFINED), ("\t\t", USER_DEFINED), ("<mask>", CONTROL),
    ]  # fmt: skip
    tokens = [text for text, _ in special]
    tokens += [text for text in dict.fromkeys([*characters, *learned, "\u2581", *byte_tokens]) if text not in tokens]
    types = [kind for _, kind in special]
    types += [BYTE if text in byte_tokens else NORMAL for text in tokens[len(types) :]]
    lines = [f"{left} {right}" for left, right in merges]
    ends = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    write_gguf(
        FOLDER / "tokens_bpe.gguf", "gpt2", tokens, types, merges=lines, add_bos_token=True, add_eos_token=True, **ends
    )

    # No byte above 0xD0 is a token, some merges make no token or are there twice: nothing for a fast path.
    odd = [text for text in tokens if text in dict(special) or all(character <= "\xd0" for character in text)]
    odd = [text for i, text in enumerate(odd) if i % 7 or len(text) < 2 or text in dict(special)]
    odd_types = [dict(special).get(text, NORMAL) for text in odd]
    write_gguf(FOLDER / "tokens_odd.gguf", "gpt2", odd, odd_types, merges=lines[::-1][:300] + lines)

    spaced = [text.replace(" ", "\u2581") for text in STRINGS if len(set(text)) > 2 and text.isprintable()]
    learned, _ = train(spaced, 1300)
    head = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *[(text, BYTE) for text in byte_tokens]]
    tail = [("<ud>", USER_DEFINED), ("<|im_end|>", USER_DEFINED), ("<mask>", CONTROL), ("\n\n", USER_DEFINED)]
    pieces = [(text, NORMAL) for text in dict.fromkeys([*learned, "\u2581\u2581", "\u2581" * 4, *tokens[8:12]])]
    pieces = [piece for piece in pieces if piece[0].isprintable() and piece[0] not in dict([*head, *tail])]
    entries = [*head, *pieces, *tail]
    tokens, types = [text for text, _ in entries], [kind for _, kind in entries]
    scores = [0.0] * len(head) + [-float(i // 3) for i in range(len(pieces))] + [0.0] * len(tail)  # with ties
    write_gguf(FOLDER / "tokens_spm.gguf", "llama", tokens, types, scores=scores, add_eos_token=True)

    # No byte tokens, no space before the text, and white space after special tokens goes (by the name).
    tail.append(("<|endoftext|>", CONTROL))
    entries = [*head[:3], *[(chr(byte), NORMAL) for byte in (10, *range(33, 127))], *pieces, *tail]
    tokens = list(dict.fromkeys(text for text, _ in entries))
    types = [dict(reversed(entries))[text] for text in tokens]
    scores = [-float(len(text) % 4) for text in tokens]
    settings = {"add_space_prefix": False, "add_bos_token": False}
    write_gguf(FOLDER / "tokens_phi.gguf", "llama", tokens, types, scores=scores, name="Tiny Phi-3 golden", **settings)


class Peer:
    """llama.cpp with one vocabulary. pre: use this pre-tokenizer instead of the file's."""

    def __init__(self, path, pre=None):
        import llama_cpp as library

        self.library = library
        self._silence = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self._silence, None)
        parameters = library.llama_model_default_params()
        parameters.vocab_only = True
        if pre is not None:
            overrides = (library.llama_model_kv_override * 2)()
            overrides[0].tag, overrides[0].key = 3, b"tokenizer.ggml.pre"
            overrides[0].value.val_str = pre.encode()
            parameters.kv_overrides = overrides
        self.model = library.llama_load_model_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self.vocabulary = library.llama_model_get_vocab(self.model)

    def encode(self, text, special, parse_special):
        data = text.encode("utf-8", "surrogateescape")
        ids = (self.library.llama_token * (3 * len(data) + 16))()  # a space may become three byte tokens
        count = self.library.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), special, parse_special)
        return list(ids[:count])

    def facts(self):
        """What the file's settings come to, and the bytes of each token as hexadecimal text."""
        library, buffer = self.library, ctypes.create_string_buffer(256)
        count = library.llama_vocab_n_tokens(self.vocabulary)
        pieces = []
        for id in range(count):
            size = library.llama_token_to_piece(self.vocabulary, id, buffer, 256, 0, True)
            pieces.append(buffer.raw[:size].hex())
        return {
            "bos": library.llama_vocab_bos(self.vocabulary),
            "eos": library.llama_vocab_eos(self.vocabulary),
            "add_bos": bool(library.llama_vocab_get_add_bos(self.vocabulary)),
            "add_eos": bool(library.llama_vocab_get_add_eos(self.vocabulary)),
            "eog": [id for id in range(count) if library.llama_vocab_is_eog(self.vocabulary, id)],
            "pieces": " ".join(pieces),
        }


def make_ids():
    """tokens.json: for each vocabulary its facts, and for each string the ids by the pre-tokenizers that give them."""
    names = list(json.loads(PRETOKENIZERS.read_text("utf-8"))["names"])
    names.remove("whitespace")  # llama.cpp aborts on two spaces
    output = {"names": names, "vocabularies": {}}
    plans = {
        "tokens_bpe.gguf": (names, STRINGS),
        "tokens_odd.gguf": (["gpt-2", "default", "llama-bpe", "tekken", "jina-v2-code", "gemma4"], STRINGS),
        "tokens_spm.gguf": ([None], STRINGS),
        "tokens_phi.gguf": ([None], ODD_STRINGS),
    }
    for file, (pres, strings) in plans.items():
        peers = [Peer(FOLDER / file, pre) for pre in pres]
        cases = []
        for text in strings:
            special = text == "" or "s" in text
            for parse_special in (False, True) if "<" in text or text == "" else (False,):
                by_ids = {}
                for pre, peer in zip(pres, peers, strict=True):
                    ids = " ".join(map(str, peer.encode(text, special, parse_special)))
                    by_ids.setdefault(ids, []).append(-1 if pre is None else names.index(pre))
                cases.append([text, special, parse_special, by_ids])
        output["vocabularies"][file] = {"facts": peers[0].facts(), "cases": cases}
    lines = json.dumps(output, separators=(",", ":")).replace('["', '\n["')
    (FOLDER / "tokens.json").write_text(lines + "\n")


if __name__ == "__main__":
    {"vocabularies": make_vocabularies, "ids": make_ids}[sys.argv[1]]()
