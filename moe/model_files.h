// A model in files: config.json and model*.safetensors (working dtype, one tensor a logical parameter, Hugging Face
// names), optimizer*.safetensors (master, m, v, detector), trainer.json. Logical names and values only, so that any
// layout and any dtype loads what any other saved.
#pragma once
#include <optional>
#include <set>

#include "llmc/checkpoint.h"
#include "llmc/files.h"
#include "llmc/safetensors.h"
#include "moe/hf.h"
#include "moe/model.h"

// Where a run stands.
struct TrainerState {
  int64_t step = 0;         // updates done
  int64_t next_sample = 0;  // global index of the next training sample
  uint64_t seed = 0;
  int64_t total_steps = 0, total_batch_tokens = 0, seq_len = 0;
  std::string dtype = "";  // of the weights: float64, float32, bfloat16
};

namespace model_files {

template <class Device>
const char* torch_dtype() {
  using Real = typename Device::Real;
  return std::is_same_v<Real, double> ? "float64" : std::is_same_v<Real, float> ? "float32" : "bfloat16";
}

inline std::string bias_name(int64_t layer) {
  return "model.layers." + std::to_string(layer) + ".mlp.gate.e_score_correction_bias";
}

inline std::vector<int64_t> shape_of(const Parameter& p) {
  return p.vector ? std::vector<int64_t>{p.cols} : std::vector<int64_t>{p.rows, p.cols};
}

// A logical tensor of a file, checked against the shape that the model needs.
inline const TensorView& find_tensor(const SafetensorsDir& files, const std::string& dir, const std::string& name,
                                     const std::vector<int64_t>& shape) {
  const TensorView& view = files.get(name);
  if (view.shape != shape) {
    auto text = [](const std::vector<int64_t>& s) {
      std::string t = "(";
      for (int64_t n : s) t += (t.size() > 1 ? "," : "") + std::to_string(n);
      return t + ")";
    };
    fail(dir, ": tensor ", name, " has shape ", text(view.shape), ", the model needs ", text(shape));
  }
  return view;
}

// Its values.
template <class Acc>
std::vector<Acc> read_tensor(const SafetensorsDir& files, const std::string& dir, const std::string& name,
                             const std::vector<int64_t>& shape) {
  const TensorView& view = find_tensor(files, dir, name, shape);
  std::vector<Acc> values(view.elements);
  read_elements(name, view, 0, view.elements, values.data());
  return values;
}

}  // namespace model_files

// Writes config.json, model*.safetensors and the tokenizer's files into dir. All ranks call it, the lead writes; what is written does not depend on
// the layout.
template <class Device>
void write_model(Model<Device>& model, const std::string& dir, const ModelFileInfo& info) {
  using Real = typename Device::Real;
  using Acc = typename Device::Acc;
  ModelFileInfo own = info;
  own.dtype = model_files::torch_dtype<Device>();
  std::string type = hf_model_type(model.config);
  std::vector<TensorSpec> specs;
  for (int64_t l = 0; l < model.config.n_layer; ++l)
    if (model.has_bias(l)) specs.push_back({model_files::bias_name(l), dtype_of<Acc>(), {model.config.n_expert}});
  for (const Parameter& p : model.table.parameters())
    specs.push_back({hf_tensor_name(p.name, type), dtype_of<Real>(), model_files::shape_of(p)});
  std::optional<SafetensorsShardedWriter> file;
  if (model.parallel.lead()) file.emplace(dir, "model", specs);
  for (int64_t l = 0; l < model.config.n_layer; ++l)
    if (model.has_bias(l)) {
      auto bias = model.read_bias(l);
      if (file) file->append(model_files::bias_name(l), bias.data(), bias.size() * sizeof(Acc));
    }
  for (const Parameter& p : model.table.parameters()) {
    auto values = model.read_parameter(p);
    if (!file) continue;
    std::vector<Real> stored(values.size());
    for (size_t i = 0; i < values.size(); ++i) stored[i] = Real(values[i]);
    file->append(hf_tensor_name(p.name, type), stored.data(), stored.size() * sizeof(Real));
  }
  if (!file) return;
  file->finish();
  for (const auto& [name, content] : info.tokenizer_files) write_file_atomic(dir + "/" + name, content);
  write_file_atomic(dir + "/config.json", hf_config(model.config, own).dump(2) + "\n");
}

// Writes a whole checkpoint OUT/step_N and returns its path (on the lead: all ranks call it).
template <class Device>
std::string save_checkpoint(Model<Device>& model, const std::string& out, const TrainerState& state,
                            const ModelFileInfo& info, int64_t keep) {
  using Acc = typename Device::Acc;
  using State = typename Model<Device>::State;
  std::optional<CheckpointWriter> checkpoint;
  std::string dir;
  if (model.parallel.lead()) {
    dir = checkpoint.emplace(out, state.step).path("");
    while (dir.size() > 1 && dir.back() == '/') dir.pop_back();
  }
  write_model(model, dir, info);

  std::vector<std::pair<State, const char*>> states{{State::m, "m."}, {State::v, "v."}};
  if (ParameterTable<Device>::has_master) states.insert(states.begin(), {State::master, "master."});
  std::vector<TensorSpec> specs{{"detector", DType::f64, {1 + 2 * OutlierState::window}}};
  for (auto [which, prefix] : states)
    for (const Parameter& p : model.table.parameters())
      specs.push_back({prefix + p.name, dtype_of<Acc>(), model_files::shape_of(p)});
  std::optional<SafetensorsShardedWriter> file;
  if (checkpoint) {
    file.emplace(dir, "optimizer", specs);
    OutlierState outliers = model.read_outliers();
    std::vector<double> detector{double(outliers.count)};
    detector.insert(detector.end(), outliers.loss, outliers.loss + OutlierState::window);
    detector.insert(detector.end(), outliers.norm, outliers.norm + OutlierState::window);
    file->append("detector", detector.data(), detector.size() * sizeof(double));
  }
  for (auto [which, prefix] : states)
    for (const Parameter& p : model.table.parameters()) {
      auto values = model.read_parameter(p, which);
      if (file) file->append(prefix + p.name, values.data(), values.size() * sizeof(Acc));
    }
  if (!file) return "";
  file->finish();

  nlohmann::ordered_json trainer{{"step", state.step},
                                 {"next_sample", state.next_sample},
                                 {"seed", state.seed},
                                 {"total_steps", state.total_steps},
                                 {"total_batch_tokens", state.total_batch_tokens},
                                 {"seq_len", state.seq_len},
                                 {"dtype", model_files::torch_dtype<Device>()},
                                 {"layout",
                                  {{"dp", model.parallel.layout.dp},
                                   {"ep", model.parallel.layout.ep},
                                   {"etp", model.parallel.layout.etp},
                                   {"tp", model.parallel.layout.tp},
                                   {"pp", model.parallel.layout.pp}}}};
  checkpoint->write_text("trainer.json", trainer.dump(2) + "\n");
  return checkpoint->commit(keep);
}

// Reads where a checkpoint's run stands. Errors name the file and the key.
inline TrainerState read_trainer_state(const std::string& dir) {
  std::string path = dir + "/trainer.json";
  auto j = nlohmann::json::parse(read_file(path, size_t(16) << 20), nullptr, false);
  TrainerState s;
  auto get = [&](const char* key, auto& value) {
    if (!j.is_object() || !j.contains(key) || !j[key].is_number_integer() ||
        (!j[key].is_number_unsigned() && j[key].get<int64_t>() < 0))
      fail(path, ": key '", key, "' is missing or not a non-negative integer; the checkpoint is damaged");
    if (std::is_signed_v<std::remove_reference_t<decltype(value)>> && j[key].template get<uint64_t>() > uint64_t(1)
                                                                                                            << 60)
      fail(path, ": key '", key, "' is absurd (more than 2^60); the checkpoint is damaged");
    value = j[key].get<std::remove_reference_t<decltype(value)>>();
  };
  get("step", s.step), get("next_sample", s.next_sample), get("seed", s.seed), get("total_steps", s.total_steps);
  get("total_batch_tokens", s.total_batch_tokens), get("seq_len", s.seq_len);
  if (!j.contains("dtype") || !j["dtype"].is_string())
    fail(path, ": key 'dtype' is missing; the checkpoint is damaged");
  s.dtype = j["dtype"].get<std::string>();
  return s;
}

// Has a directory every weight of the model, and none that the model lacks (a bias, say, which would be ignored)? Asked
// before memory is allocated for what a damaged config.json says.
template <class Device>
void check_weights(const Model<Device>& model, const std::string& dir, const std::string& model_type) {
  SafetensorsDir files(dir, "model");
  std::set<std::string> known;
  if (model.config.tied) known.insert("lm_head.weight");  // some writers store the shared matrix twice
  for (int64_t l = 0; l < model.config.n_layer; ++l)
    if (model.has_bias(l)) {
      model_files::find_tensor(files, dir, model_files::bias_name(l), {model.config.n_expert});
      known.insert(model_files::bias_name(l));
    }
  for (const Parameter& p : model.table.parameters()) {
    std::string name = hf_tensor_name(p.name, model_type);
    model_files::find_tensor(files, dir, name, model_files::shape_of(p));
    known.insert(name);
  }
  for (const std::string& name : files.names())
    if (!known.contains(name)) fail(dir, ": tensor ", name, " has no place in the model that config.json describes");
}

// Fills weights (and the routers' bias) from a checkpoint or Hugging Face directory of the same configuration.
template <class Device>
void load_weights(Model<Device>& model, const std::string& dir, const std::string& model_type) {
  using Acc = typename Device::Acc;
  SafetensorsDir files(dir, "model");
  for (const Parameter& p : model.table.parameters()) {
    if (p.buffer < 0) continue;  // another rank has it
    auto values =
        model_files::read_tensor<Acc>(files, dir, hf_tensor_name(p.name, model_type), model_files::shape_of(p));
    model.write_parameter(p, values.data());
  }
  for (int64_t l = 0; l < model.config.n_layer; ++l)
    if (model.has_bias(l) && files.find(model_files::bias_name(l))) {
      auto bias = model_files::read_tensor<Acc>(files, dir, model_files::bias_name(l), {model.config.n_expert});
      model.write_bias(l, bias.data());
    }
}

// Fills master weights, moments and the detector; weights become the rounded masters where there are any.
template <class Device>
void load_optimizer(Model<Device>& model, const std::string& dir) {
  using Acc = typename Device::Acc;
  using State = typename Model<Device>::State;
  SafetensorsDir files(dir, "optimizer");
  for (const Parameter& p : model.table.parameters()) {
    if (p.buffer < 0) continue;
    auto shape = model_files::shape_of(p);
    if (files.find("master." + p.name))
      model.write_parameter(p, model_files::read_tensor<Acc>(files, dir, "master." + p.name, shape).data());
    model.write_state(p, State::m, model_files::read_tensor<Acc>(files, dir, "m." + p.name, shape).data());
    model.write_state(p, State::v, model_files::read_tensor<Acc>(files, dir, "v." + p.name, shape).data());
  }
  auto detector = model_files::read_tensor<double>(files, dir, "detector", {1 + 2 * OutlierState::window});
  OutlierState outliers;
  if (!(detector[0] >= 0 && detector[0] < 1e15))
    fail(dir, ": tensor detector counts ", detector[0], " steps; the checkpoint is damaged");
  outliers.count = int64_t(detector[0]);
  std::copy_n(detector.begin() + 1, OutlierState::window, outliers.loss);
  std::copy_n(detector.begin() + 1 + OutlierState::window, OutlierState::window, outliers.norm);
  model.write_outliers(outliers);
}
