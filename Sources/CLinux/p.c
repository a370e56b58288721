int apus_linux_placeholder(void){return 0;}
