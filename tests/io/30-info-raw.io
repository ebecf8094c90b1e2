$ create -q -f raw disk 4M
@ -f raw disk
info
