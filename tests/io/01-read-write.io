$ create -q -f qcow2 disk 4M
@ -f qcow2 disk
write 0 64k
read 0 64k
write -P 0x5a 128k 64k
read -P 0x5a 128k 64k
read -P 0xcd 0 64k
read -P 0 64k 64k
