// The command line of the workshop's programs (dev/bench_options.h): no GPU needed.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>

#include "dev/bench_options.h"
#include "dev/test/error_line.h"
#include "dev/test/temp_dir.h"

namespace {
using namespace bench;
using Names = std::vector<std::string>;

Options parsed(Names arguments, std::map<std::string, std::string> own = {}) {
  arguments.insert(arguments.begin(), "family");
  std::vector<char*> argv;
  for (std::string& a : arguments) argv.push_back(a.data());
  return parse_options(int(argv.size()), argv.data(), own);
}
const Names variants = {"production", "01_naive", "02_tiles", "10_last", "copy", "cub", "cublaslt"};
const Names shapes = {"1024x64", "1024x128", "olmoe", "fine.even", "fine.skewed"};

TEST(BenchOptions, PositionsAreVariantAndShape) {
  Options o = parsed({"3,copy", "--quick", "1024x64"});
  EXPECT_EQ(o.variants, (Names{"3", "copy"}));
  EXPECT_EQ(o.shapes, Names{"1024x64"});
  EXPECT_TRUE(o.quick && o.positional);
  for (const char* all : {"-", "all"}) {
    o = parsed({all, "olmoe"});
    EXPECT_TRUE(o.variants.empty());
    EXPECT_EQ(o.shapes, Names{"olmoe"});
  }
}

TEST(BenchOptions, NamedOptions) {
  Options o = parsed({"--shapes", "a,b", "--variants", "c", "--out", "f", "--run-id", "r", "--chunk", "7", "--json",
                      "--list", "--check-only"},
                     {{"chunk", "256"}, {"other", "x"}});
  EXPECT_EQ(o.shapes, (Names{"a", "b"}));
  EXPECT_EQ(o.variants, Names{"c"});
  EXPECT_EQ(o.out, "f");
  EXPECT_EQ(o.run_id, "r");
  EXPECT_EQ(o.number("chunk"), 7);
  EXPECT_EQ(o.own.at("other"), "x");
  EXPECT_TRUE(o.json && o.list && o.check_only);
  EXPECT_FALSE(o.positional);
}

TEST(BenchOptions, Refused) {
  for (const Names& arguments : {Names{"--nonsense", "1"}, Names{"--nonsense"}})
    expect_refused([&] { parsed(arguments); }, "'--nonsense'");
  expect_refused([] { parsed({"-x"}); }, "'-x'");
  expect_refused([] { parsed({"--out"}); }, "--out needs a value");
  expect_refused([] { parsed({"a", "b", "c"}); }, "'c'");
  expect_refused([] { parsed({"--shapes", "s", "a", "b"}); }, "--shapes");
  expect_refused([] { parsed({}, {{"n", "-1"}}).number("n"); }, "--n");
}

// What a person tries does not end up among the results that tables are made of.
TEST(BenchOptions, OnlyWholeRunsAreRecorded) {
  EXPECT_TRUE(parsed({}).records());
  for (const Names& part :
       {Names{"3"}, Names{"all"}, Names{"--quick"}, Names{"--shapes", "a"}, Names{"--variants", "a"}}) {
    EXPECT_FALSE(parsed(part).records()) << part[0];
    Names named = part;
    named.insert(named.end(), {"--out", "f"});
    EXPECT_TRUE(parsed(named).records()) << part[0];
  }
  EXPECT_FALSE(parsed({"--check-only", "--out", "f"}).records());
  EXPECT_FALSE(parsed({"--list"}).records());
}

TEST(BenchOptions, Variants) {
  EXPECT_EQ(match_variant("02_tiles", variants), "02_tiles");
  EXPECT_EQ(match_variant("2", variants), "02_tiles");
  EXPECT_EQ(match_variant("02", variants), "02_tiles");
  EXPECT_EQ(match_variant("10", variants), "10_last");
  EXPECT_EQ(match_variant("1", variants), "01_naive");
  EXPECT_EQ(match_variant("0", variants), "production");
  EXPECT_EQ(match_variant("prod", variants), "production");
  EXPECT_EQ(match_variant("cub", variants), "cub");  // a whole name, though another begins with it
  EXPECT_EQ(match_variant("7", variants), "");
  EXPECT_EQ(match_variant("nothing", variants), "");
  expect_refused([] { match_variant("c", variants); }, "copy cub cublaslt");
}

TEST(BenchOptions, WholeNamesTakeThePlaceOfWhatIsAskedFor) {
  Options o = parsed({"3,2,02", "fine,1024x1"});
  expect_refused([&] { settle_names(o, variants, shapes); }, "'3'", "production 01_naive 02_tiles 10_last");
  o = parsed({"2,02,0", "fine,1024x1"});
  EXPECT_FALSE(settle_names(o, variants, shapes));
  EXPECT_EQ(o.variants, (Names{"02_tiles", "production"}));
  EXPECT_EQ(o.shapes, (Names{"fine.even", "fine.skewed", "1024x128"}));
  o = parsed({"--list"});
  testing::internal::CaptureStdout();
  EXPECT_TRUE(settle_names(o, {"production", "01_naive"}, {"a", "b"}));
  EXPECT_EQ(testing::internal::GetCapturedStdout(), "shapes: a b\nvariants: production 01_naive\n");
}

TEST(BenchOptions, Shapes) {
  EXPECT_EQ(match_shape("olmoe", shapes), Names{"olmoe"});
  EXPECT_EQ(match_shape("o", shapes), Names{"olmoe"});
  EXPECT_EQ(match_shape("1024x1", shapes), Names{"1024x128"});
  EXPECT_EQ(match_shape("fine", shapes), (Names{"fine.even", "fine.skewed"}));
  expect_refused([] { match_shape("1024", shapes); }, "1024x64 1024x128");
  expect_refused([] { match_shape("big", shapes); }, "olmoe");
}

TEST(BenchOptions, ResultsAreFoundFromBelow) {
  TempDir dir;
  std::filesystem::path root(dir.path());
  std::filesystem::create_directories(root / "repository/dev/results");
  std::filesystem::create_directories(root / "repository/build/deep");
  std::filesystem::create_directories(root / "elsewhere");
  EXPECT_EQ(find_results({root / "elsewhere", root / "repository/build/deep"}), root / "repository/dev/results");
  expect_refused([&] { find_results({root / "elsewhere", ""}); }, "--out");
}

TEST(BenchOptions, RowsAreAppended) {
  TempDir dir;
  const std::string out = dir.path() + "/rows.jsonl";
  for (const char* row : {"{}", "[]"}) Results(parsed({"--out", out}), "gpu").write(row);
  Results(parsed({"--out", out, "--check-only"}), "gpu").write("not these");
  std::ifstream file(out);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(file), {}), "{}\n[]\n");
  expect_refused([&] { Results(parsed({"--out", dir.path() + "/no/such"}), "gpu"); }, "no/such: cannot be written");
}

TEST(BenchOptions, Percentiles) {
  Timing t = percentiles({9, 1, 5, 3, 7, 2, 4, 6, 8, 10, 11});
  EXPECT_EQ(t.median, 6);
  EXPECT_EQ(t.p10, 2);
  EXPECT_EQ(t.p90, 10);
  EXPECT_FALSE(percentiles({}));
}
}  // namespace
