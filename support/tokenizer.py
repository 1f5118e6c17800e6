"""Tokenizers: tiktoken's encodings in, Hugging Face's tokenizer.json out."""
import os
import re

import tiktoken

from support.files import write_json
from support.flags import InputError
from support.processes import is_first


def tiktoken_encoding(name):
    """A tiktoken.Encoding, downloaded on first use. InputError if there is none, or no network."""
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:
        raise InputError(f"--tokenizer: there is no encoding {name!r}; use tinytldr, gpt2 or "
                         "another name that tiktoken knows") from error
    except Exception as error:     # it downloads through whatever raises here
        raise InputError(f"--tokenizer: tiktoken could not download its {name!r} encoding "
                         f"({type(error).__name__}); on a machine without network, point "
                         "TIKTOKEN_CACHE_DIR at a copy of its cache") from error


MAX_WHITE_SPACE = 500_000       # characters in a row; tiktoken gives up at about a million


def encode_text(text, tokenizer):
    """Token ids of a text, in which special tokens are ordinary text. ValueError if the tokenizer
    can't read it."""
    if len(text) > MAX_WHITE_SPACE:
        longest = max(map(len, re.findall(r"\s+", text)), default=0)
        if longest > MAX_WHITE_SPACE:
            raise ValueError(f"{longest:,} characters of white space in a row; the tokenizer reads "
                             f"{MAX_WHITE_SPACE:,} at most")
    try:
        return tokenizer.encode_ordinary(text)
    except BaseException as error:      # tiktoken's is no Exception, and has no name to import
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizer can't read this text; is it very long and without "
                         "spaces?") from None


def special_tokens(tokenizer):
    """The texts of a tokenizer's special tokens, such as "<|endoftext|>", as a list."""
    return list(tokenizer._special_tokens)


END_OF_TEXT = "<|endoftext|>"
SPLIT_INTO_WORDS = r" ?[A-Za-z']+| ?[^\sA-Za-z']+|\s"     # all characters: any text round-trips


def word_encoding(name, texts):
    """A tiktoken.Encoding of the 256 bytes, then every word of the texts (with and without a space
    before it) as one token, then the end of text. Other text falls back to bytes."""
    pieces = {piece for text in texts for piece in re.findall(SPLIT_INTO_WORDS, text)}
    pieces |= {" " + piece for piece in pieces if not piece.startswith(" ")}
    words = [bytes([b]) for b in range(256)]
    words += sorted(piece.encode() for piece in pieces if len(piece.encode()) > 1)
    return tiktoken.Encoding(name=name, pat_str=SPLIT_INTO_WORDS,
                             mergeable_ranks={word: rank for rank, word in enumerate(words)},
                             special_tokens={END_OF_TEXT: len(words)})


def check_vocabulary(model, tokenizer, where):
    """InputError if the model has no room for all of the tokenizer's tokens. where: a flag."""
    if model.config.vocab_size < tokenizer.n_vocab:
        raise InputError(f"{where}: the model knows {model.config.vocab_size} tokens, and "
                         f"{tokenizer.name} has {tokenizer.n_vocab}")


def save_tokenizer(directory, tokenizer, block_size):
    """Writes a tiktoken.Encoding as tokenizer.json and tokenizer_config.json, so that
    `transformers` reads and writes the same tokens with a saved model.

    tiktoken merges two neighbours if together they are a token, those with the lowest rank first;
    tokenizer.json lists pairs to merge, the first ones first: so every way to cut a token in two
    tokens is such a pair.
    """
    if not is_first():
        return
    ranks = tokenizer._mergeable_ranks                                      # {bytes: id}
    letters = byte_letters()
    vocab, merges = {}, []
    for token in sorted(ranks, key=ranks.get):
        text = "".join(letters[byte] for byte in token)
        vocab[text] = ranks[token]
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append(f"{text[:cut]} {text[cut:]}")         # a letter for each byte
    special = [{"id": number, "content": name, "special": True, "single_word": False,
                "lstrip": False, "rstrip": False, "normalized": False}
               for name, number in tokenizer._special_tokens.items()]
    pattern = tokenizer._pat_str.replace("}+", "}")     # "possessive" there; here "several times"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": True, "vocab": vocab, "merges": merges}
    write_json(os.path.join(directory, "tokenizer.json"), {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None, "decoder": as_bytes, "model": model,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]}})
    end = tokenizer.decode([tokenizer.eot_token])
    write_json(os.path.join(directory, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
        "model_max_length": block_size, "clean_up_tokenization_spaces": False})


def byte_letters():
    """{byte: letter} as GPT-2 writes bytes: printable ones as they are, the others from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printable)
    return ({byte: chr(byte) for byte in printable}
            | {byte: chr(256 + i) for i, byte in enumerate(others)})
