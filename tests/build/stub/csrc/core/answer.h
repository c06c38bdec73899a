// A header that the stub depends on.
#pragma once

constexpr int kAnswer = 42;
