// One decode step of the recurrence as a C++ extension, for comparison: what a compiler at install time would buy.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>

// state (b, h, p, n) in place; x, y (b, h, p); dt (b, h); A, D (h,); B, C (b, g, n); all float32 and contiguous.
void ssd_step(torch::Tensor state, torch::Tensor x, torch::Tensor dt, torch::Tensor A, torch::Tensor B, torch::Tensor C,
              torch::Tensor D, torch::Tensor y) {
  const int64_t batch = state.size(0), heads = state.size(1), p = state.size(2), n = state.size(3), groups = B.size(1);
  float* states = state.data_ptr<float>();
  float* out = y.data_ptr<float>();
  const float *inputs = x.data_ptr<float>(), *steps = dt.data_ptr<float>(), *rates = A.data_ptr<float>();
  const float *writes = B.data_ptr<float>(), *reads = C.data_ptr<float>(), *skips = D.data_ptr<float>();
  at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t sequence = index / heads, head = index % heads, group = head / (heads / groups);
      const float* write = writes + (sequence * groups + group) * n;
      const float* read = reads + (sequence * groups + group) * n;
      const float decay = std::exp(steps[index] * rates[head]);
      for (int64_t j = 0; j < p; ++j) {
        float* row = states + (index * p + j) * n;
        const float value = inputs[index * p + j], added = steps[index] * value;
        float total = skips[head] * value;
        for (int64_t k = 0; k < n; ++k) {
          row[k] = row[k] * decay + added * write[k];
          total += row[k] * read[k];
        }
        out[index * p + j] = total;
      }
    }
  });
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) { module.def("ssd_step", &ssd_step); }
