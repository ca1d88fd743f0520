// extern "C" entries for tests/simt/host.py: a launcher's exceptions as a return code and a message.
#pragma once

#include <cstdio>
#include <exception>

// int name(const Params*, char* message, size_t size): launcher(params, nullptr).
#define SIMT_ENTRY(name, Params, launcher)                                      \
  extern "C" int name(const Params* params, char* message, size_t size) {       \
    try {                                                                       \
      launcher(*params, nullptr);                                                   \
      return 0;                                                                 \
    } catch (const std::exception& error) {                                     \
      std::snprintf(message, size, "%s", error.what());                         \
      return 1;                                                                 \
    }                                                                           \
  }
