// What the build was told of the processor.
const char* instruction_set_name() {
#if defined(DDPM_FAST_NATIVE)
  return "native";
#else
  return "portable";
#endif
}
