$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
writev 0 4k 8k 512
read -P 0xcd 0 12800
writev -P 4 100k 1 2 3 4
readv -P 4 100k 4 3 2 1
readv -v 100k 8 8
readv -P 5 100k 5 5
