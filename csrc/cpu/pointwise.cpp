// What Python calls in place of what models compute between their linears, where that gives the same bits: in a decode
// step the calls of torch's operators take longer than their work, and with many tokens each of them goes through memory.

#include "python.h"

#include "ops.h"
#include "split.h"

namespace mlora {
namespace {

// The type of a tensor's elements, if kernels have it.
bool type_in(PyObject* object, Type* type) {
  dlpack::Tensor t;
  if (!tensor_in(object, &t)) return false;
  for (const Type one : {kFloat, kHalf, kBFloat16}) {
    if (has_type(t, one)) {
      *type = one;
      return true;
    }
  }
  return false;
}

// (batch, head, token, dim), or without heads, whose last dimension is contiguous: its data and other strides.
template <int Dims>
bool places_in(PyObject* object, Type type, const int64_t (&shape)[Dims], char** data, int64_t (&strides)[Dims - 1]) {
  dlpack::Tensor t;
  if (!tensor_in(object, &t) || !has_type(t, type) || t.dims != Dims) return false;
  for (int d = 0; d < Dims; ++d) {
    if (t.shape[d] != shape[d] && !(t.shape[d] == 1 && d == 0 && Dims == 3)) return false;
  }
  if (shape[Dims - 1] > 1 && t.strides[Dims - 1] != 1) return false;
  for (int d = 0; d + 1 < Dims; ++d) strides[d] = t.shape[d] == 1 ? 0 : t.strides[d];
  *data = data_of(t);
  return true;
}

}  // namespace

PyObject* rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 4)) return nullptr;
  Type type;
  Rows y, x, weight;
  if (!type_in(args[1], &type) || !rows_in(args[0], type, &y) || !rows_in(args[1], type, &x) ||
      !rows_in(args[2], type, &weight) || weight.rows != 1 || weight.width != x.width || y.width != x.width ||
      y.rows != x.rows || (y.rows > 1 && y.stride != y.width)) {
    return PyBool_FromLong(0);
  }
  const double eps = PyFloat_AsDouble(args[3]);
  if (eps == -1 && PyErr_Occurred()) return nullptr;
  const RmsNorm n = {x.data, weight.data, y.data, x.stride, x.width, static_cast<float>(eps)};
  return run([&] {
    split<KeepSubnormals>(4 * x.rows * x.width, [&](int64_t task, int64_t tasks) {
      kernels().rms_norm[type](n, task * x.rows / tasks, (task + 1) * x.rows / tasks);
    });
  });
}

PyObject* rotate(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 4)) return nullptr;
  Type type;
  dlpack::Tensor t;
  if (!type_in(args[1], &type) || !tensor_in(args[1], &t) || t.dims != 4 || t.shape[3] % 2) return PyBool_FromLong(0);
  Rotation r = {};
  const int64_t shape[] = {t.shape[0], t.shape[1], t.shape[2], t.shape[3]}, places[] = {shape[0], shape[2], shape[3]};
  char *y, *x, *cos, *sin;
  if (!places_in(args[0], type, shape, &y, r.y_stride) || !places_in(args[1], type, shape, &x, r.x_stride) ||
      !places_in(args[2], type, places, &cos, r.cos_stride) || !places_in(args[3], type, places, &sin, r.sin_stride)) {
    return PyBool_FromLong(0);
  }
  r.y = y;
  r.x = x;
  r.cos = cos;
  r.sin = sin;
  r.heads = shape[1];
  r.tokens = shape[2];
  r.dim = shape[3];
  const int64_t all = shape[0] * shape[2];
  return run([&] {
    split<KeepSubnormals>(2 * all * r.heads * r.dim, [&](int64_t task, int64_t tasks) {
      kernels().rotate[type](r, task * all / tasks, (task + 1) * all / tasks);
    });
  });
}

PyObject* gate(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!counts(count, 3)) return nullptr;
  Type type;
  Rows y, of, up;
  const auto whole = [](const Rows& t) { return t.rows <= 1 || t.stride == t.width; };
  if (!type_in(args[1], &type) || !kernels().gate[type] || !rows_in(args[0], type, &y) ||
      !rows_in(args[1], type, &of) || !rows_in(args[2], type, &up) || y.rows != of.rows || up.rows != of.rows ||
      y.width != of.width || up.width != of.width || !whole(y) || !whole(of) || !whole(up)) {
    return PyBool_FromLong(0);
  }
  constexpr int64_t kUnit = 64;  // elements: whole cache lines
  const int64_t size = of.rows * of.width, units = ceil_div(size, kUnit);
  return run([&] {
    split<KeepSubnormals>(4 * size, [&](int64_t task, int64_t tasks) {
      const int64_t from = task * units / tasks * kUnit, to = (task + 1) * units / tasks * kUnit;
      kernels().gate[type](of.data, up.data, y.data, from, to < size ? to : size);
    });
  });
}

}  // namespace mlora
