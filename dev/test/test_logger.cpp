#include "llmc/logger.h"

#include <gtest/gtest.h>

#include <clocale>
#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

#include "dev/test/error_line.h"
#include "dev/test/temp_dir.h"
#include "llmc/random.h"

namespace {

using nlohmann::ordered_json;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

TEST(Logger, NumbersHaveNineDigitsAndAreJson) {
  EXPECT_EQ(format_number(0.1f), "0.100000001");
  EXPECT_EQ(format_number(5.54517744447956), "5.54517744");
  EXPECT_EQ(format_number(2), "2");
  EXPECT_EQ(format_number(1e20), "1e+20");
  EXPECT_EQ(format_number(3e-4), "0.0003");
  EXPECT_EQ(format_number(-1.5e-7), "-1.5e-07");
  EXPECT_EQ(format_number(kNaN), "null");
  EXPECT_EQ(format_number(-kNaN), "null");
  EXPECT_EQ(format_number(kInf), "null");
  EXPECT_EQ(format_number(-kInf), "null");
}

TEST(Logger, NineDigitsTellAllFloatsApart) {
  for (uint64_t i = 0; i < 20000; i++) {
    float value = std::bit_cast<float>(uint32_t(random_bits(1, 2, i)));
    if (!std::isfinite(value)) continue;
    std::string text = format_number(value);
    ASSERT_EQ(std::stof(std::abs(value) < 1e-37f ? "0" : text), std::abs(value) < 1e-37f ? 0.0f : value) << text;
    ASSERT_TRUE(ordered_json::accept(text)) << text;
  }
}

TEST(Logger, JsonKeepsOrderAndIsValid) {
  ordered_json record = {{"step", 3},
                         {"loss", 5.54517744447956},
                         {"bad", kNaN},
                         {"load", {1.0, kInf, 0.25}},
                         {"nested", {{"z", 1}, {"a", -2}}},
                         {"text", "a\"b\n\xff"},
                         {"flag", true},
                         {"none", nullptr},
                         {"empty", ordered_json::array()},
                         {"object", ordered_json::object()}};
  std::string line = format_json(record);
  EXPECT_EQ(line,
            "{\"step\":3,\"loss\":5.54517744,\"bad\":null,\"load\":[1,null,0.25],\"nested\":{\"z\":1,\"a\":-2},"
            "\"text\":\"a\\\"b\\n\xef\xbf\xbd\",\"flag\":true,\"none\":null,\"empty\":[],\"object\":{}}");
  EXPECT_TRUE(ordered_json::accept(line));
}

TEST(Logger, LinesOfBothFiles) {
  TempDir dir;
  std::string out = dir / "a/b";  // created
  {
    Logger log(out, false);
    log.validation(0, 5.545177);
    log.train(1, 5.54321, 3e-4, 1.234);
    log.eval(1, 0.25);
    log.record({{"step", 1}, {"loss", 5.5}});
    // Each line is in the file as soon as it is logged.
    EXPECT_EQ(get_file(out + "/main.log"), "s:0 tel:5.5452\ns:1 trl:5.5432 lr:0.000300 norm:1.23\ns:1 eval:0.2500\n");
    EXPECT_EQ(get_file(out + "/log.jsonl"), "{\"step\":1,\"loss\":5.5}\n");
  }
  {
    Logger log(out, true);
    log.train(2, kNaN, 0, kInf);
    log.record({{"step", 2}, {"loss", kNaN}});
  }
  EXPECT_NE(get_file(out + "/main.log").find("norm:1.23\ns:1 eval:0.2500\ns:2 trl:nan lr:0.000000 norm:inf\n"),
            std::string::npos);
  EXPECT_EQ(get_file(out + "/log.jsonl"), "{\"step\":1,\"loss\":5.5}\n{\"step\":2,\"loss\":null}\n");
  { Logger log(out, false); }
  EXPECT_EQ(get_file(out + "/main.log"), "");
  EXPECT_EQ(get_file(out + "/log.jsonl"), "");
}

TEST(Logger, TruncateAfterDropsLaterStepsAndTornLines) {
  TempDir dir;
  std::string main = "s:1 trl:1.0000 lr:0.000300 norm:1.00\ns:2 tel:1.0000\ns:10 trl:1.0000 lr:0.000300 norm:1.00\n";
  put_file(dir / "main.log", main + "garbage\ns:3 trl:1.0000 lr:0.000300 norm:1.00\ns:2 trl:1.0");
  put_file(
      dir / "log.jsonl",
      "{\"run\":\"x\"}\n{\"step\":1}\n{\"step\":2,\"loss\":1}\n{\"step\":3}\n{\"step\":\n[1]\n{\"step\":2,\"val_l");
  Logger log(dir.path(), true);
  log.truncate_after(2);
  EXPECT_EQ(get_file(dir / "main.log"), "s:1 trl:1.0000 lr:0.000300 norm:1.00\ns:2 tel:1.0000\n");
  EXPECT_EQ(get_file(dir / "log.jsonl"), "{\"run\":\"x\"}\n{\"step\":1}\n{\"step\":2,\"loss\":1}\n");
  log.train(3, 1, 0, 1);
  log.record({{"step", 3}});
  EXPECT_EQ(get_file(dir / "main.log"),
            "s:1 trl:1.0000 lr:0.000300 norm:1.00\ns:2 tel:1.0000\ns:3 trl:1.0000 lr:0.000000 norm:1.00\n");
  EXPECT_EQ(get_file(dir / "log.jsonl"), "{\"run\":\"x\"}\n{\"step\":1}\n{\"step\":2,\"loss\":1}\n{\"step\":3}\n");
  log.truncate_after(-1);
  EXPECT_EQ(get_file(dir / "main.log"), "");
  EXPECT_EQ(get_file(dir / "log.jsonl"), "{\"run\":\"x\"}\n");
}

// A run that crashed at any byte of its log and went on from its checkpoint has the log of one that never crashed.
TEST(Logger, CrashAtAnyByteThenResume) {
  TempDir whole, broken;
  auto log_steps = [](Logger& log, int first, int last) {
    for (int step = first; step <= last; step++) {
      log.train(step, 1.0 / step, 1e-3, step);
      log.record({{"step", step}, {"loss", 1.0 / step}});
    }
  };
  {
    Logger log(whole.path(), false);
    log_steps(log, 1, 8);
  }
  std::string main = get_file(whole / "main.log"), json = get_file(whole / "log.jsonl");
  size_t first = json.find("{\"step\":4");  // a checkpoint was saved at step 3
  for (size_t cut = first; cut <= json.size(); cut++) {
    put_file(broken / "main.log", main.substr(0, std::max(main.find("s:4"), std::min(cut, main.size()))));
    put_file(broken / "log.jsonl", json.substr(0, cut));
    Logger log(broken.path(), true);
    log.truncate_after(3);
    log_steps(log, 4, 8);
    ASSERT_EQ(get_file(broken / "main.log"), main) << cut;
    ASSERT_EQ(get_file(broken / "log.jsonl"), json) << cut;
  }
}

TEST(Logger, InactiveAndMoved) {
  Logger none;
  none.train(1, 1, 1, 1);
  none.record({{"step", 1}});
  none.truncate_after(0);
  TempDir dir;
  Logger log;
  log = Logger(dir.path(), false);
  log.validation(7, 1);
  Logger other = std::move(log);
  other.validation(8, 1);
  EXPECT_EQ(get_file(dir / "main.log"), "s:7 tel:1.0000\ns:8 tel:1.0000\n");
}

TEST(Logger, ErrorsNameTheFile) {
  TempDir dir;
  put_file(dir / "file", "");
  expect_refused([&] { Logger(dir / "file/out", false); }, dir / "file/out");
  std::filesystem::create_directory(dir / "main.log");
  expect_refused([&] { Logger(dir.path(), false); }, dir / "main.log");
  TempDir full;
  std::filesystem::create_symlink("/dev/full", full / "log.jsonl");
  Logger log(full.path(), false);
  log.train(1, 1, 1, 1);
  expect_refused([&] { log.record({{"step", 1}}); }, "log.jsonl: cannot write: No space left on device");
}

}  // namespace
