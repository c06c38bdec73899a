// A module with the names that ddpm_fast/runtime/extension.py calls, and no operators.
#include <Python.h>

#include "core/answer.h"

const char* instruction_set_name();

static PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(instruction_set_name()); }
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(kAnswer); }

static PyMethodDef methods[] = {{"instruction_set", instruction_set, METH_NOARGS, nullptr},
                                {"answer", answer, METH_NOARGS, nullptr},
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
