/* What the two files of the extension share. */
#ifndef ELASTIC_EP_NATIVE_H
#define ELASTIC_EP_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_kernels.h"

#define UNLOCK_BYTES (1 << 16) /* work beyond this runs without the interpreter's lock */

/* ((expert, first row, end row), ...) of the experts with rows; end [experts] is where each one's rows end. */
PyObject *build_groups(const int64_t *end, int64_t experts);

PyObject *begin_dispatch(PyObject *self, PyObject *args);
PyObject *finish_dispatch(PyObject *self, PyObject *args);
PyObject *do_combine(PyObject *self, PyObject *args);

#endif
