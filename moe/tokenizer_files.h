// The files beside a model from which transformers' AutoTokenizer opens its tokenizer. They travel with it: what a
// model directory holds is kept in its checkpoints and exports; a model that began here gets its own.
#pragma once
#include <map>
#include <string>

#include "llmc/tokenizer.h"

using TokenizerFiles = std::map<std::string, std::string>;  // content by name

// Those of a directory; none if it has none.
TokenizerFiles read_tokenizer_files(const std::string& dir);

// tokenizer.json and tokenizer_config.json with the same ids as `tokenizer`, and <|endoftext|> as the one special token.
// As everywhere in transformers, that text written in a document becomes the token.
TokenizerFiles make_tokenizer_files(const Tokenizer& tokenizer);
